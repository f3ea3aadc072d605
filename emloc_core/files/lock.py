"""Locks that are released when their process ends, on files that the holder may rename or remove."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[BinaryIO]:
    """Open a file for appending, creating it if needed, and hold an exclusive lock on it until the block ends.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is False.
        FileNotFoundError: its directory does not exist.
    """
    kind = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, kind)
            if is_at(file, path):
                yield file
                return


def is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file is still at this path: it may have been renamed or removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
