"""Commands, and calls in other processes, run in the process of the test: a new one takes seconds."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any
from unittest import mock

import pytest

from emloc_core.cli import main
from emloc_core.processes.call import call, called_here

#: Fields of TRL's SFTConfig for three steps on a CPU that change what a tiny model says.
PLAIN_TRAINING = {"max_steps": 3, "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 1e-2}

_run = subprocess.run


def call_here(
    function: str, arguments: Mapping[str, Any], *, environment: Mapping[str, str] | None = None, **_: Any
) -> Iterator[Any]:
    """Stand for :func:`emloc_core.processes.call.call`: the same function and the same JSON, in this process."""
    with called_here(), mock.patch.dict(os.environ, environment or {}):
        yield from call(function, arguments)


def patch_calls(patch: pytest.MonkeyPatch) -> None:
    """Let stages and systems run in this process, and not in one of their own."""
    for caller in ("recipe.run", "recipe.decided", "recipe.answers", "evaluation.evaluate"):
        patch.setattr(f"emloc_core.{caller}.call", call_here)


def run_here(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Stand for ``subprocess.run``: run an ``emloc`` command in this process."""
    if command[:3] != [sys.executable, "-m", "emloc_core"]:  # git, say, which libraries ask for a version
        return _run(command, **options)
    with mock.patch.object(sys, "argv", ["emloc", *command[3:]]), redirect_stdout(sys.stderr):
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
    return subprocess.CompletedProcess(command, code, "", "")
