"""Units in pinned memory of the CPU, from which a GPU copies them as fast as the bus allows.

The tensors of a unit lie in one buffer, so that they are pinned and copied as one. Units that fit the room stay; the
others pass through one more buffer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from emloc_core import devices

#: Tensors begin in a buffer at multiples of so many bytes, as GPUs like it.
_ALIGNMENT = 512

Tensors = Mapping[str, torch.Tensor]


class Places:
    """Where the tensors of a unit lie in a buffer.

    Args:
        tensors: by name, of any shapes and dtypes.

    Attributes:
        nbytes: size of the buffer.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self.nbytes = 0
        for name, tensor in tensors.items():
            self._places[name] = self.nbytes, tensor.shape, tensor.dtype
            self.nbytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

    def tensors(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors that lie in a buffer, (nbytes or more,), uint8."""
        return {
            name: buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (start, shape, dtype) in self._places.items()
        }


@dataclass
class Pinned:
    """A unit in pinned memory, and on a GPU the event that ends its last copy from there."""

    places: Places
    memory: torch.Tensor
    copied: "torch.Event | None" = None

    def copy(self, device: torch.device, stream: "torch.Stream") -> torch.Tensor:
        """Begin to copy it to a GPU on a stream; return the buffer there, which is whole after ``copied``."""
        with devices.interface(device).stream(stream):
            buffer = torch.empty(self.places.nbytes, dtype=torch.uint8, device=device)
            buffer.copy_(self.memory[: self.places.nbytes], non_blocking=True)
            self.copied = stream.record_event()
        return buffer


class PinnedMemory:
    """Units by name, each read once where there is room.

    Args:
        room: bytes of the CPU's memory that units may fill to stay.
    """

    def __init__(self, room: float) -> None:
        self._room = room
        self._staying: dict[str, Pinned] = {}
        self._passing: Pinned | None = None

    def unit(self, name: str, read: Callable[[], Tensors]) -> Pinned:
        """Return a unit, in memory that the next call may reuse; ``read`` returns its tensors."""
        if name in self._staying:
            return self._staying[name]
        tensors = read()
        places = Places(tensors)
        if _pinned_size(places.nbytes) <= self._room:
            self._room -= _pinned_size(places.nbytes)
            pinned = self._staying[name] = Pinned(places, _buffer(places.nbytes))
        else:
            pinned = self._passing = self._through(places)
        for tensor, target in places.tensors(pinned.memory).items():
            target.copy_(tensors[tensor])
        return pinned

    def _through(self, places: Places) -> Pinned:
        """Return the buffer that units pass through, once the one before has left it."""
        before = self._passing
        if before is None or before.memory.nbytes < places.nbytes:
            return Pinned(places, _buffer(places.nbytes))
        if before.copied is not None:
            before.copied.synchronize()
        return Pinned(places, before.memory)

    def leave(self, name: str) -> None:
        """Forget a unit that is not needed again: another one may take its room."""
        if pinned := self._staying.pop(name, None):
            self._room += _pinned_size(pinned.places.nbytes)

    def clear(self) -> None:
        """Forget all units."""
        self._staying.clear()
        self._passing = None


def _buffer(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _pinned_size(nbytes: int) -> int:
    """Return what torch takes of the CPU's memory to pin so many bytes: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0
