"""The frozen weights of a model that does not fit: one unit at a time, the next one read in the background.

Exact steps ask for units in the same order every time, so the unit that followed the last time is read ahead; a caller
that knows the order beforehand passes it to ``expect``. Units that fit the room given stay. For a GPU, units pass
through a pinned buffer of the CPU, or stay in pinned memory where there is room for them, and each is copied as one.
The copy may begin before the unit is asked for, on a stream of its own, with memory of the GPU for two units; a
computation waits only for its own unit.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from emloc_core import devices
from emloc_core.errors import EmlocError
from emloc_core.model.pinned import Pinned, PinnedMemory
from emloc_core.model.skeleton import Skeleton


@dataclass(frozen=True)
class _Loaded:
    """A unit on the device: its parameters by name; on a GPU the buffer that they lie in, and what ends its copy."""

    tensors: Mapping[str, torch.Tensor]
    buffer: torch.Tensor | None = None
    copied: "torch.Event | None" = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class FrozenWeights:
    """Lends the weights of units.

    Args:
        skeleton: reads them, in memory of the CPU. It is read in another thread, so nothing else may use it meanwhile.
        device: where they are computed with.
        room: bytes of the device that units may fill to stay there, besides the one in use and the next one.
        pinned: bytes of the CPU's memory that units may fill to stay there, pinned for a GPU.
        begins: whether the next unit's copy to a GPU begins before it is asked for; otherwise there is one unit there.

    Attributes:
        reads: how many times every unit was brought to the device.
        bytes_read: how much that was, in bytes.
        waited: seconds for which a unit that was asked for was not there yet.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        units: Sequence[str],
        device: torch.device,
        room: float = 0,
        pinned: float = 0,
        *,
        begins: bool = True,
    ) -> None:
        self.skeleton, self.device, self.room = skeleton, device, room
        self.reads: Counter[str] = Counter()
        self.bytes_read = 0
        self.waited = 0.0
        self._names = {unit: skeleton.names(unit) for unit in units}
        self._current: tuple[str, _Loaded] | None = None
        self._before: str | None = None
        self._followed: dict[tuple[str | None, str], str] = {}
        self._ahead: tuple[str, Future[_Loaded | Pinned]] | None = None
        self._staying: dict[str, _Loaded] = {}
        self._pinned = PinnedMemory(pinned)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="frozen-weights")
        self._copies = devices.copies_alongside(device)
        self._side = devices.interface(device).Stream(device) if self._copies and begins else None
        self._stamps = {shard: _stamp(shard) for shard in skeleton.checkpoint.shards}

    def parameters(self, unit: str) -> Mapping[str, torch.Tensor]:
        """Return the parameters of a unit by their names in it, on the device; valid until another unit is asked for.

        Raises:
            EmlocError: a tensor is missing or of another shape, or the files have changed since training began.
        """
        if self._current is None or self._current[0] != unit:
            self._move_to(unit)
        assert self._current is not None
        return self._current[1].tensors

    def expect(self, order: Sequence[str]) -> None:
        """Read ahead in this order, as far as units are asked for in it."""
        for before, unit, following in zip([None, *order], order, order[1:], strict=False):
            self._followed[before, unit] = following

    def close(self) -> None:
        """Forget all units, and end the reading thread."""
        self._reader.shutdown(cancel_futures=True)
        self._current = self._ahead = None
        self._staying.clear()
        self._pinned.clear()

    def _move_to(self, unit: str) -> None:
        previous = self._current[0] if self._current else None
        if previous is not None:
            self._followed[self._before, previous] = unit
        self._before, self._current = previous, None  # its memory is free before more is taken
        finished = self._stream().record_event() if self._side is not None else None
        self._current = unit, self._take(unit, finished)
        following = self._followed.get((previous, unit))
        if following is not None and following not in self._staying:
            self._ahead = following, self._reader.submit(self._load, following, finished)

    def _take(self, unit: str, finished: "torch.Event | None") -> _Loaded:
        if unit in self._staying:
            return self._staying[unit]
        started = time.perf_counter()
        if self._ahead is None or self._ahead[0] != unit:
            self._ahead = unit, self._reader.submit(self._load, unit, finished)
        content = self._ahead[1].result()
        self._ahead = None
        self.waited += time.perf_counter() - started
        loaded = self._copied(content, self._stream()) if isinstance(content, Pinned) else content
        if loaded.copied is not None:
            stream = self._stream()
            stream.wait_event(loaded.copied)
            assert loaded.buffer is not None
            loaded.buffer.record_stream(stream)  # freed in this stream's order, not the copy's
        if loaded.nbytes <= self.room:
            self.room -= loaded.nbytes
            self._staying[unit] = loaded
            self._pinned.leave(unit)
        return loaded

    def _load(self, unit: str, finished: "torch.Event | None") -> _Loaded | Pinned:
        """Read a unit, and on a GPU where copies begin early begin that; in the reading thread.

        Args:
            finished: if so, the end of all that is computed with units that were asked for before the one in use.
        """
        self.reads[unit] += 1
        if not self._copies:
            tensors = {name: tensor.to(self.device) for name, tensor in self._read(unit).items()}
            self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
            return _Loaded(tensors)
        pinned = self._pinned.unit(unit, lambda: self._read(unit))
        self.bytes_read += pinned.places.nbytes
        if self._side is None or finished is None:
            return pinned
        finished.synchronize()  # its memory is free only then; the CPU, which runs ahead of a GPU, would take more
        return self._copied(pinned, self._side)

    def _copied(self, pinned: Pinned, stream: "torch.Stream") -> _Loaded:
        """Begin to copy a unit to the GPU."""
        buffer = pinned.copy(self.device, stream)
        return _Loaded(pinned.places.tensors(buffer), buffer, pinned.copied)

    def _stream(self) -> torch.Stream:
        """Return the stream that is computed on."""
        stream: torch.Stream = devices.interface(self.device).current_stream(self.device)
        return stream

    def _read(self, unit: str) -> Mapping[str, torch.Tensor]:
        with self.skeleton.parameters(self._names[unit]) as parameters:
            tensors = {name.removeprefix(f"{unit}."): tensor.detach() for name, tensor in parameters.items()}
        for shard, stamp in self._stamps.items():
            if _stamp(shard) != stamp:
                raise EmlocError(
                    f"{shard} has changed since it was first read.",
                    "Restore the model, and run the same command again.",
                    resumable=True,
                )
        return tensors


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
