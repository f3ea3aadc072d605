"""Where waiting samples keep their hidden states: on the device while there is room, in the CPU's memory otherwise.

A sample that waits is a forward in the midst of a model's own code, which holds its tensors by its own names. So not
the tensors are moved but what is under them: the storage's bytes are copied away and the storage emptied, and filled
again before the sample goes on.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

#: Share of the device's free memory that waiting samples may fill; the rest is for weights and statistics.
SHARE = 0.5


class Parking:
    """Keeps the tensors of waiting samples.

    Args:
        limit: bytes that may stay on the device.
        shared: the model's own buffers; they stay whoever holds them.
    """

    def __init__(self, limit: float, shared: Iterable[torch.Tensor] = ()) -> None:
        self.limit = limit
        self._shared = {tensor.untyped_storage().data_ptr() for tensor in shared}
        self._held: dict[int, int] = {}  # sample -> its bytes on the device
        self._moved: dict[int, list[tuple[torch.UntypedStorage, torch.UntypedStorage]]] = {}

    @classmethod
    def on(cls, device: torch.device, shared: Iterable[torch.Tensor] = ()) -> "Parking":
        """Return a parking for a device: all stays on the CPU, and a share of what is free on a GPU."""
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
        """Forget all samples: they will not go on."""
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
