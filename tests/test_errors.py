"""One-line texts for exceptions."""

import ast

import pytest
import torch
from support.paths import ROOT

from emloc_core.errors import CODES, EmlocError, first_line, printable, typed_line
from emloc_core.stages.perform import finish
from emloc_core.zoo.jobs.faults import classify


@pytest.mark.parametrize(
    ("error", "line", "typed"),
    [
        (ValueError("wrong"), "wrong", "ValueError: wrong"),
        (ValueError("\n wrong\nand more"), "wrong", "ValueError: wrong"),
        (ValueError("Wrong:\n\ta\n\tb"), "Wrong: a", "ValueError: Wrong: a"),
        (ValueError("Wrong:"), "Wrong:", "ValueError: Wrong:"),
        (ValueError(), "ValueError", "ValueError"),
        (OSError(" \n"), "OSError", "OSError"),
        (TypeError("Encoder(\n  (0): ReLU()\n) takes none"), "Encoder takes none", "TypeError: Encoder takes none"),
    ],
)
def test_what_an_exception_says(error, line, typed):
    assert first_line(error) == line
    assert typed_line(error) == typed


class Job:
    """A stage that ends with an error."""

    def __init__(self, error):
        self.error = error

    def run(self, _progress):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("could not create a primitive"),
    ],
)
def test_a_stage_that_runs_out_of_memory_says_so_and_resumes(error):
    with pytest.raises(EmlocError, match=r"Out of memory .* Free memory and run the same command again") as caught:
        finish("compress", Job(error))
    assert (caught.value.code, caught.value.resumable) == ("memory", True)
    assert classify(EmlocError(str(caught.value))) == "out of memory"  # also where the cause was left in a process


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), EmlocError("NaN in a weight.", code="not-finite")])
def test_other_errors_of_a_stage_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught:
        finish("compress", Job(error))
    assert caught.value is error


def test_a_line_has_nothing_that_a_terminal_acts_on():
    assert printable("a\nb\x1b[2J\r\x00\u202e\ud800 \u00e9\u4e16") == "a b\\x1b[2J\\r\\x00\\u202e\\ud800 \u00e9\u4e16"


def test_every_code_is_a_known_one():
    used = {"invalid"}  # the default
    for path in (ROOT / "emloc_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                used.add(node.value.value)
    assert used <= set(CODES)
    with pytest.raises(AssertionError):
        EmlocError("wrong", code="nonsense")
