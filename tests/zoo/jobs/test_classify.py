"""Causes: of exceptions, as libraries raise them, and of processes, as they end."""

import errno
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

from emloc_core.errors import DiskFullError, EmlocError
from emloc_core.files.checkpoint import open_checkpoint
from emloc_core.zoo.jobs.faults import classify, ended, memory_kills


def real(work):
    """Return what is raised."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
        work()
    return caught.value


def chained(error, cause):
    error.__cause__ = cause
    return error


def handled():
    """Raise a user's error that replaces another: what came before was dealt with."""
    try:
        raise OSError(errno.EIO, "read")
    except OSError:
        raise EmlocError("It is wrong.") from None


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(), "out of memory"),
        (real(lambda: torch.empty(1 << 50)), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (OSError(errno.ENOMEM, "mmap"), "out of memory"),
        (chained(EmlocError("It stopped."), torch.OutOfMemoryError()), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (EmlocError("It stopped.", code="memory", resumable=True), "out of memory"),
        (EmlocError("No way fits.", code="memory"), "bad input"),
        (DiskFullError("full", "Free some space."), "disk"),
        (OSError(errno.ENOSPC, "write"), "disk"),
        (OSError(errno.EFBIG, "write"), "disk"),
        (chained(EmlocError("It stopped."), OSError(errno.EIO, "read")), "input/output"),
        (TimeoutError("the hub"), "input/output"),
        (ConnectionResetError(), "input/output"),
        (LocalEntryNotFoundError("no connection"), "input/output"),
        (EmlocError("It is wrong."), "bad input"),
        (real(handled), "bad input"),
        (real(Path("/nowhere/at/all").read_text), "bad input"),
        (SafetensorError("header"), "bad input"),
        (RuntimeError("shapes do not match"), "crash"),
        (KeyError("x"), "crash"),
    ],
)
def test_an_exception_tells_its_cause(error, cause):
    assert classify(error) == cause


class ReadTimeoutError(Exception):
    """Like the error of the hub's HTTP library, which has no built-in base class."""


@pytest.mark.parametrize("error", [ReadTimeoutError("slow"), RuntimeError("Task error: CAS Client Error")])
def test_a_connection_that_is_lost_during_a_download_is_tried_again(monkeypatch, error):
    """As the hub's HTTP library says it, and as hf_xet does."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
    raised = real(lambda: open_checkpoint("people/model"))
    assert (classify(raised), str(error) in str(raised)) == ("input/output", True)


def test_what_is_not_here_offline_will_not_be_here_later():
    assert classify(LocalEntryNotFoundError("no connection"), offline=True) == "bad input"


def end(code):
    return subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.DEVNULL).returncode


@pytest.mark.parametrize(
    ("code", "cause", "expected"),
    [
        ("raise ValueError", "crash", "exit code 1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "lost worker", "SIGKILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "lost worker", "SIGTERM"),
        ("import os; os.abort()", "crash", "SIGABRT"),
    ],
)
def test_the_end_of_a_process_tells_its_cause(code, cause, expected):
    outcome = ended(end(code), memory_kills(), "It")
    assert (outcome.cause, expected in outcome.message) == (cause, True)


def test_the_kernel_kills_for_want_of_memory():
    """Its count of kills has grown since: it was the kernel."""
    assert ended(-signal.SIGKILL, memory_kills() - 1, "It").cause == "out of memory"
