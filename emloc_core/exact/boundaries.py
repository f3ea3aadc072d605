"""Stores the activations at block boundaries until the backward: on the device, in CPU memory, or on a disk.

Checkpointing keeps a block's inputs, and autograd's hooks on saved tensors say where. On a GPU the copies are enqueued
on the stream that computes, so that they are in order with it and need no event.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from emloc_core import devices
from emloc_core.files.scratch import ScratchFile

#: Smaller tensors stay where they are: positions, masks of short rows.
_SMALL = 1 << 16


@dataclass(frozen=True)
class _Away:
    """A tensor that is kept elsewhere: its copy in the CPU's memory, or its offset in the file."""

    content: "torch.Tensor | int"
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Boundaries:
    """Keeps the arguments of checkpointed blocks.

    Args:
        room: bytes that may stay on the device.
        directory: where a file without a name is made for the others; None: they go to the CPU's memory.
        reserved: bytes that they may take there.
    """

    def __init__(self, room: float = float("inf"), directory: Path | None = None, reserved: float = 0) -> None:
        self.room, self.reserved = room, reserved
        self._free = room
        self._file = ScratchFile(directory) if directory else None
        self._end = 0

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Decide for the tensors that are saved for the backward within the context."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def clear(self) -> None:
        """Start again: nothing kept is needed any more."""
        self._free, self._end = self.room, 0
        if self._file:
            self._file.clear()

    def close(self) -> None:
        """Remove the file, if there is one."""
        if self._file:
            self._file.close()

    def _pack(self, tensor: torch.Tensor) -> "torch.Tensor | _Away":
        if tensor.nbytes < _SMALL or 0 in tensor.stride():  # an expanded one is smaller, and cannot be written to
            return tensor
        if tensor.nbytes <= self._free:
            self._free -= tensor.nbytes
            return tensor
        return _Away(self._store(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def _store(self, tensor: torch.Tensor) -> "torch.Tensor | int":
        if self._file is None:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=devices.copies_alongside(tensor.device))
            return copy.copy_(tensor, non_blocking=True)
        offset, self._end = self._end, self._end + tensor.nbytes
        self._file.write(tensor.detach().cpu().contiguous(), offset)
        return offset

    def _unpack(self, packed: "torch.Tensor | _Away") -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if isinstance(packed.content, torch.Tensor):
            copy = packed.content
        else:
            assert self._file
            copy = torch.empty(packed.shape, dtype=packed.dtype)
            self._file.read(copy, packed.content)
        # As it lay in memory: products of other layouts take other steps, which the recomputation would not find again.
        restored = torch.empty_strided(packed.shape, packed.stride, dtype=packed.dtype, device=packed.device)
        return restored.copy_(copy, non_blocking=True)
