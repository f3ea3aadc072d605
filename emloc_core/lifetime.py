"""Processes that do not outlive the one that started them, however that ends: no stage runs on as an orphan."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

_PARENT = "EMLOC_PARENT"  # environment variable: the process that this one does not outlive
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def child_environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a process that calls :func:`end_with_parent` first of all."""
    return {**base, _PARENT: str(os.getpid())}


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this process when the one that gave it its :func:`child_environment` ends, if any did."""
    parent = os.environ.pop(_PARENT, None)  # what this process starts has another parent
    if parent is not None:
        die_with(int(parent), number)


def die_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends; only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it ended before that
            os.kill(os.getpid(), number)
