"""Commands and stages, run in the process of the test."""

import io
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest import mock

from emloc_core.cli import main
from emloc_core.evaluation import system

#: Fields of TRL's SFTConfig for three steps on a CPU that change what a tiny model says.
PLAIN_TRAINING = {"max_steps": 3, "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 1e-2}


_run = subprocess.run


def run_here(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Stand for ``subprocess.run``: run a stage or an evaluation in this process, for a new one takes seconds."""
    if command[:2] != [sys.executable, "-m"]:  # git, say, which libraries ask for a version
        return _run(command, **options)
    module, *arguments = command[2:]
    captured = options.get("capture_output", False)
    out, err = (io.StringIO(), io.StringIO()) if captured else (sys.stderr, sys.stderr)
    with mock.patch.object(sys, "argv", ["emloc", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = system.main(*arguments) if module == "emloc_core.evaluation.system" else main()
        except SystemExit as exit:
            code = exit.code
    said = (out.getvalue(), err.getvalue()) if captured else ("", "")
    return subprocess.CompletedProcess(command, int(code or 0), *said)
