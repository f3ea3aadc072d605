"""Locks that end with the process that holds them, on files that their holder may rename or remove."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[BinaryIO]:
    """Open a file to append, made where it is not there, and hold it alone until the block ends.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
        FileNotFoundError: its directory is not there.
    """
    kind = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, kind)
            if is_at(file, path):
                yield file
                return


def is_at(file: BinaryIO, path: Path) -> bool:
    """Say whether an open file still has this name: it may have been renamed or removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
