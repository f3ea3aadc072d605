"""A file for tensors that must wait outside memory: no name refers to it, so that it is gone when its process is."""

import ctypes
import os
import tempfile
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import torch


class ScratchFile:
    """Bytes of tensors by their place in a file."""

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


class ScratchTensors:
    """Tensors by name, in such a file; in memory, where there is no directory for one."""

    def __init__(self, directory: Path | None) -> None:
        self._file = ScratchFile(directory) if directory else None
        self._kept: dict[Hashable, torch.Tensor] = {}  # in a file, without contents
        self._places: dict[Hashable, tuple[int, torch.device]] = {}
        self._end = 0

    def __setitem__(self, name: Hashable, tensor: torch.Tensor) -> None:
        """Keep a copy of a tensor that has no such name yet."""
        if self._file is None:
            self._kept[name] = tensor.detach().clone()
            return
        self._file.write(tensor.detach().cpu().contiguous(), self._end)
        self._kept[name], self._places[name] = torch.empty_like(tensor, device="meta"), (self._end, tensor.device)
        self._end += tensor.nbytes

    def __getitem__(self, name: Hashable) -> torch.Tensor:
        """Return a tensor, on the device that it was on."""
        kept = self._kept[name]
        if self._file is None:
            return kept
        place, device = self._places[name]
        found = torch.empty(kept.shape, dtype=kept.dtype)
        self._file.read(found, place)
        return found.to(device)

    def __iter__(self) -> Iterator[Any]:
        """Yield the names, in the order in which tensors came."""
        return iter(self._kept)


def _bytes(content: torch.Tensor | torch.UntypedStorage) -> memoryview:
    """Return the bytes without a copy. A storage whose tensor was lent to NumPy could never be emptied again."""
    nbytes = content.nbytes if isinstance(content, torch.Tensor) else content.nbytes()
    return memoryview((ctypes.c_ubyte * nbytes).from_address(content.data_ptr())).cast("B")
