"""Forks instead of new processes, which would import everything again for each of thousands of cases."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from typing import Any, NoReturn

_MODULES = {"emloc_core": "emloc_core.cli", "emloc_core.processes.call": "emloc_core.processes.call"}
#: Names of what :mod:`subprocess` passes, by position.
_, *_PARAMETERS = signature(subprocess.Popen._execute_child).parameters  # type: ignore[attr-defined]


class Fork(subprocess.Popen[Any]):
    """``subprocess.Popen`` that forks where a module of ours would be started."""

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:
        """Start the process."""
        if list(args[:2]) != [sys.executable, "-m"] or args[2] not in _MODULES:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        arguments = dict(zip(_PARAMETERS, (args, *rest), strict=True))
        stdin, to_stdin, from_stdout = arguments["p2cread"], arguments["p2cwrite"], arguments["c2pread"]
        stdout, from_stderr, stderr = arguments["c2pwrite"], arguments["errread"], arguments["errwrite"]
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in (to_stdin, from_stdout, from_stderr):
                if descriptor != -1:
                    os.close(descriptor)
            for number, descriptor in enumerate((stdin, stdout, stderr)):
                if descriptor != -1:
                    os.dup2(descriptor, number)
            os.chdir(arguments["cwd"] or ".")
            if arguments["env"] is not None:
                os.environ.clear()
                os.environ.update(arguments["env"])
            sys.argv = ["emloc", *args[3:]]
            sys.stdin = os.fdopen(0, closefd=False)
            become(import_module(_MODULES[args[2]]).main)
        self._child_created = True
        for ours, theirs in ((to_stdin, stdin), (from_stdout, stdout), (from_stderr, stderr)):
            if ours != -1:
                os.close(theirs)


def become(main: Callable[[], int | None]) -> NoReturn:
    """Run a function as this process's program, and exit with the code that Python would give."""
    code = 70
    try:
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        code = main() or 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
