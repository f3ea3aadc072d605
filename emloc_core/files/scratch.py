"""A file for tensors that must wait outside memory: no name refers to it, so it disappears with its process."""

import ctypes
import os
import tempfile
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import torch


class ScratchFile:
    """Bytes of tensors by their offset in a file."""

    def __init__(self, directory: Path) -> None:
        self._file: Any = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - until close()

    def write(self, content: torch.Tensor | torch.UntypedStorage, offset: int) -> None:
        """Write a contiguous tensor, or a storage, on the CPU from this offset on."""
        remaining = _bytes(content)
        while remaining:
            written = os.pwrite(self._file.fileno(), remaining, offset)
            remaining, offset = remaining[written:], offset + written

    def read(self, content: torch.Tensor | torch.UntypedStorage, offset: int) -> None:
        """Fill a tensor or a storage with the bytes written at this offset."""
        remaining = _bytes(content)
        while remaining:
            read = os.preadv(self._file.fileno(), [remaining], offset)
            remaining, offset = remaining[read:], offset + read

    def clear(self) -> None:
        """Free the disk space."""
        self._file.truncate(0)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


class ScratchTensors:
    """Tensors by name, in a :class:`ScratchFile`; in memory if there is no directory for one."""

    def __init__(self, directory: Path | None) -> None:
        self._file = ScratchFile(directory) if directory else None
        self._tensors: dict[Hashable, torch.Tensor] = {}  # in a file, without contents
        self._offsets: dict[Hashable, tuple[int, torch.device]] = {}
        self._end = 0

    def __setitem__(self, name: Hashable, tensor: torch.Tensor) -> None:
        """Keep a copy of a tensor that has no such name yet."""
        if self._file is None:
            self._tensors[name] = tensor.detach().clone()
            return
        self._file.write(tensor.detach().cpu().contiguous(), self._end)
        self._tensors[name], self._offsets[name] = torch.empty_like(tensor, device="meta"), (self._end, tensor.device)
        self._end += tensor.nbytes

    def __getitem__(self, name: Hashable) -> torch.Tensor:
        """Return a tensor, on the device that it was on."""
        template = self._tensors[name]
        if self._file is None:
            return template
        offset, device = self._offsets[name]
        tensor = torch.empty(template.shape, dtype=template.dtype)
        self._file.read(tensor, offset)
        return tensor.to(device)

    def __iter__(self) -> Iterator[Any]:
        """Yield the names, in the order in which tensors came."""
        return iter(self._tensors)


def _bytes(content: torch.Tensor | torch.UntypedStorage) -> memoryview:
    """Return the bytes without a copy. A storage whose tensor was lent to NumPy could never be emptied again."""
    nbytes = content.nbytes if isinstance(content, torch.Tensor) else content.nbytes()
    return memoryview((ctypes.c_ubyte * nbytes).from_address(content.data_ptr())).cast("B")
