"""A file for tensors that must wait outside memory: no name refers to it, so that it is gone when its process is."""

import ctypes
import os
import tempfile
from pathlib import Path
from typing import Any

import torch


class ScratchFile:
    """Bytes of tensors by their place in a file.

    Args:
        directory: on the disk that holds it.
    """

    def __init__(self, directory: Path) -> None:
        self._file: Any = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - until close()

    def write(self, content: torch.Tensor | torch.UntypedStorage, place: int) -> None:
        """Write a contiguous tensor, or a storage, on the CPU from this place on."""
        left = _bytes(content)
        while left:
            written = os.pwrite(self._file.fileno(), left, place)
            left, place = left[written:], place + written

    def read(self, content: torch.Tensor | torch.UntypedStorage, place: int) -> None:
        """Fill it with what was written there."""
        left = _bytes(content)
        while left:
            read = os.preadv(self._file.fileno(), [left], place)
            left, place = left[read:], place + read

    def clear(self) -> None:
        """Give the disk its room back."""
        self._file.truncate(0)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


def _bytes(content: torch.Tensor | torch.UntypedStorage) -> memoryview:
    """Return the bytes without a copy. A storage whose tensor was lent to NumPy could never be emptied again."""
    nbytes = content.nbytes if isinstance(content, torch.Tensor) else content.nbytes()
    return memoryview((ctypes.c_ubyte * nbytes).from_address(content.data_ptr())).cast("B")
