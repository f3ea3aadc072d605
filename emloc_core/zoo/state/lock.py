"""One driver per zoo: the process that holds ``zoo.lock``.

The workers of this machine inherit the lock, so that the driver after a killed one waits until they are gone.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from emloc_core.errors import EmlocError

LOCK = "zoo.lock"
_PATIENCE = 10.0  # seconds within which the workers of a killed driver must have ended


@contextmanager
def driving(directory: Path) -> Iterator[int]:
    """Hold the lock of a zoo; yields its file descriptor, for workers to inherit.

    Raises:
        EmlocError: another driver holds it.
    """
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not try_lock(descriptor):
            owner = _owner(descriptor)
            # If there is no such process, it may run on another machine that shares this disk.
            if (owner is not None and psutil.pid_exists(owner)) or time.monotonic() > deadline:
                raise EmlocError(
                    f"{directory} is being converted already (process {owner or 'unknown'}).",
                    "Wait for it, or stop it; `emloc zoo status` shows its progress.",
                )
            time.sleep(0.02)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def is_driven(directory: Path) -> bool:
    """Say whether a driver, or a worker that it left behind, holds the lock."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file if that is possible at once; say whether it was."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(descriptor: int) -> int | None:
    with contextlib.suppress(ValueError):
        return int(os.pread(descriptor, 20, 0))
    return None
