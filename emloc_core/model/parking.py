"""Storage for the hidden states of waiting samples: on the device while there is room, in CPU memory otherwise.

A waiting sample is a forward paused inside the model's own code, whose variables refer to its tensors. So instead of
moving the tensors, the bytes of their storages are copied away, the storages emptied, and filled again before the
sample resumes.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

#: Fraction of the device's free memory that waiting samples may fill; the rest is for weights and statistics.
SHARE = 0.5


class Parking:
    """Keeps the tensors of waiting samples.

    Args:
        limit: bytes that may stay on the device.
        shared: the model's own buffers, which always stay.
    """

    def __init__(self, limit: float, shared: Iterable[torch.Tensor] = ()) -> None:
        self.limit = limit
        self._shared = {tensor.untyped_storage().data_ptr() for tensor in shared}
        self._held: dict[int, int] = {}  # sample -> its bytes on the device
        self._moved: dict[int, list[tuple[torch.UntypedStorage, torch.UntypedStorage]]] = {}

    @classmethod
    def on(cls, device: torch.device, shared: Iterable[torch.Tensor] = ()) -> "Parking":
        """Return a parking for a device: without limit on the CPU, with a fraction of the free memory on a GPU."""
        limit = SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
        return cls(limit, shared)

    def enter(self, sample: int, arguments: Any) -> None:
        """Park a sample that waits with these arguments: nested tuples, lists and dicts of anything."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors(arguments)}
        storages = {pointer: storage for pointer, storage in storages.items() if pointer not in self._shared}
        size = sum(storage.nbytes() for storage in storages.values())
        if sum(self._held.values()) + size <= self.limit:
            self._held[sample] = size
            return
        moved = []
        for storage in storages.values():
            moved.append((storage, storage.cpu() if storage.device.type != "cpu" else storage.clone()))
            storage.resize_(0)
        self._moved[sample] = moved

    def leave(self, sample: int) -> None:
        """Give a sample back what it held when it was parked."""
        self._held.pop(sample, None)
        for storage, content in self._moved.pop(sample, []):
            storage.resize_(content.nbytes())
            storage.copy_(content)

    def clear(self) -> None:
        """Forget all samples, which will not resume."""
        self._held.clear()
        self._moved.clear()


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    if isinstance(arguments, torch.Tensor):
        yield arguments
    elif isinstance(arguments, dict):
        for value in arguments.values():
            yield from _tensors(value)
    elif isinstance(arguments, tuple | list):
        for value in arguments:
            yield from _tensors(value)
