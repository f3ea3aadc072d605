"""Processes that never outlive their parent, however it ends, so that no stage keeps running as an orphan,
and that end without delay.
"""

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

_PARENT = "EMLOC_PARENT"  # environment variable: id of the process that this one must not outlive
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOST = 120  # Python's exit code where the output could not be written


def child_environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a process that calls :func:`end_with_parent` first."""
    return {**base, _PARENT: str(os.getpid())}


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this process when the process that made its :func:`child_environment` ends, if any."""
    parent = os.environ.pop(_PARENT, None)  # processes started from here have another parent
    if parent is not None:
        die_with(int(parent), number)


def die_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, for whatever reason. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it has already ended
            os.kill(os.getpid(), number)


def run_to_end(main: Callable[[], int | None]) -> NoReturn:
    """Run the main function of a program, and end the process with the code that it returns, or exits with.

    Objects are not freed one by one then, which takes up to two seconds after torch is imported. Threads are waited
    for, and what ``main`` registers with :mod:`atexit` is called.
    """
    code = 1  # for an exception, which Python prints

    def end() -> None:
        lost = False
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it was closed from the start
            try:
                stream.flush()
            except OSError:
                lost = True
        os._exit(code or lost * _LOST)

    atexit.register(end)  # first, so that it is called last
    try:
        code = main() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(code)
