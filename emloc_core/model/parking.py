"""Storage for the tensors of waiting samples: on the device while there is room, elsewhere otherwise.

A waiting sample is a forward paused inside the model's own code, whose variables refer to its tensors. So instead of
moving the tensors, the bytes of their storages are copied away, the storages emptied, and filled again before the
sample resumes. From a GPU they go to CPU memory, from there to a file.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from emloc_core import devices
from emloc_core.compat.torch import storage_id, tree_leaves
from emloc_core.errors import EmlocError
from emloc_core.files.scratch import ScratchFile
from emloc_core.model.device import free_of

#: Fraction of the device's free memory that waiting samples may fill; the rest is for weights and statistics.
SHARE = 0.5

#: A storage that was emptied, and its content: in CPU memory, or its offset and bytes in the file.
_Moved = tuple[torch.UntypedStorage, "torch.UntypedStorage | tuple[int, int]"]


class Parking:
    """Keeps the tensors of waiting samples.

    Args:
        limit: bytes that may stay on the device.
        shared: tensors of the model's own, such as buffers, which always stay.
        directory: where a file is made for the hidden states of samples that wait inside a block; None: there is none,
            and what is beyond the limit goes to CPU memory.
    """

    def __init__(self, limit: float, shared: Iterable[torch.Tensor] = (), directory: Path | None = None) -> None:
        self.limit = limit
        self._shared: set[int] = set()
        self.keep(shared)
        self._on_device: dict[int, int] = {}  # sample -> its bytes on the device
        self._moved: dict[int, list[_Moved]] = {}
        self._hidden: dict[int, list[weakref.ref[torch.Tensor]]] = {}  # of a sample
        self._directory = directory
        self._file: ScratchFile | None = None
        self._room: dict[int, tuple[int, int]] = {}  # sample -> the offset and length of its part of the file
        self._end = 0

    @classmethod
    def on(
        cls,
        device: torch.device,
        shared: Iterable[torch.Tensor] = (),
        directory: Path | None = None,
        *,
        needed: int = 0,
    ) -> "Parking":
        """Return a parking for a device: without limit on the CPU, with a fraction of the free memory on a GPU.

        Args:
            directory: as in the constructor; of a GPU, everything beyond the limit goes to CPU memory.
            needed: bytes of a GPU that must stay free for other things than samples.
        """
        if devices.is_accelerator(device):
            free = free_of(device)
            return cls(max(0, min(SHARE * free, free - needed)), shared)
        return cls(float("inf"), shared, directory)

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let tensors that samples share, such as parameters, always stay."""
        self._shared.update(storage_id(tensor.untyped_storage()) for tensor in tensors)

    @contextmanager
    def keeping(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Let tensors stay while the context is active, such as a block's parameters, which its Linears may read."""
        added = {storage_id(tensor.untyped_storage()) for tensor in tensors} - self._shared
        self._shared |= added
        try:
            yield
        finally:
            self._shared -= added

    def know(self, sample: int, *hidden: torch.Tensor) -> None:
        """Take in hidden states that a sample has computed for itself: they are parked too, as long as they live."""
        self._hidden.setdefault(sample, []).extend(map(weakref.ref, hidden))

    def enter(self, sample: int, arguments: Any, hidden: Any = None, *, inside: bool = False) -> None:
        """Park a sample.

        Args:
            arguments: what it waits with, nested tuples, lists and dicts of anything.
            hidden: the hidden states among them, which are the sample's alone: they stay parked as long as they live.
            inside: whether it waits inside a block.

        Raises:
            EmlocError: it waits with a tensor of another sample that waits.
        """
        if isinstance(hidden, torch.Tensor):
            self.know(sample, hidden)
        references = self._hidden[sample] = [ref for ref in self._hidden.get(sample, ()) if ref() is not None]
        tensors = [tensor for ref in references if (tensor := ref()) is not None]
        if self._directory is None:
            tensors += [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        storages = {storage_id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
        storages = {key: storage for key, storage in storages.items() if key not in self._shared}
        for tensor in tensors:
            require_own(tensor)
        size = sum(storage.nbytes() for storage in storages.values())
        to_file = inside and self._directory is not None
        if not to_file and sum(self._on_device.values()) + size <= self.limit:
            self._on_device[sample] = size
        else:
            self._moved[sample] = self._move(sample, list(storages.values()), size)

    def leave(self, sample: int) -> None:
        """Restore the tensors that a sample held when it was parked."""
        self._on_device.pop(sample, None)
        for storage, content in self._moved.pop(sample, []):
            if isinstance(content, torch.UntypedStorage):
                storage.resize_(content.nbytes())
                storage.copy_(content)
            else:
                assert self._file
                offset, size = content
                storage.resize_(size)
                self._file.read(storage, offset)

    def clear(self) -> None:
        """Forget all samples, which will not resume."""
        for store in (self._on_device, self._moved, self._hidden, self._room):
            store.clear()
        self._end = 0
        if self._file:
            self._file.close()
            self._file = None

    def _move(self, sample: int, storages: list[torch.UntypedStorage], size: int) -> list[_Moved]:
        moved: list[_Moved] = []
        if self._directory is None:
            moved += [
                (storage, storage.cpu() if storage.device.type != "cpu" else storage.clone()) for storage in storages
            ]
        else:
            self._file = self._file or ScratchFile(self._directory)
            offset, room = self._room.get(sample, (0, 0))
            if size > room:
                offset = self._end
                self._room[sample] = (offset, size)
                self._end += size
            for storage in storages:
                self._file.write(storage, offset)
                moved.append((storage, (offset, storage.nbytes())))
                offset += storage.nbytes()
        for storage in storages:
            storage.resize_(0)
        return moved


def require_own(tensor: torch.Tensor) -> None:
    """Refuse a tensor of a sample that is parked: the running one must not use it."""
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise EmlocError(
            "Two rows share a tensor: the model keeps what it computes for one row, and uses it for the next.",
            "Streaming needs forwards that do not depend on each other; EMLoC does not support this model.",
            code="unsupported",
        )
