"""Processes that are killed for real, without the seconds that each would take to import torch."""

import os
import signal
from collections.abc import Callable

from support.forkserver import warm_process


def kill() -> None:
    """End this process as the kernel does when memory runs out: nothing is caught, closed or written any more."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(run: Callable[..., object], *args: object) -> None:
    """Run a function of a test module in a process of its own, which has to be killed."""
    process = warm_process(run, *args)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
