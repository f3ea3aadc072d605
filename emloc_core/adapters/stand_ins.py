"""What stands in for the weights of a base in an emulator's files, one at a time."""

from collections.abc import Iterator

import torch

from emloc_core.files.checkpoint import Checkpoint
from emloc_core.standins import StandIn
from emloc_core.standins.experts import part_name
from emloc_core.standins.registry import format_of
from emloc_core.standins.vocabulary import PACKINGS, PARTS, packed_layers


class StandIns:
    """Reads them.

    Args:
        emulator: its checkpoint.

    Raises:
        EmlocError: no plugin provides its format.
    """

    def __init__(self, emulator: Checkpoint) -> None:
        self._emulator, self._format = emulator, format_of(emulator.config)
        self._vocabulary = packed_layers(emulator.config)

    def of(self, key: str, path: str, weight: torch.Tensor) -> StandIn | None:
        """Return what stands in for a weight; None where the emulator has the weight itself.

        Args:
            key: of the weight in the base's checkpoint.
            path: of its Linear.
            weight: (m, n); the stand-in has its dtype and is on its device.
        """
        packing, shape = self._vocabulary.get(path), (weight.shape[0], weight.shape[1])
        names = PARTS if packing else self._format.names()
        keys = [f"{key.removesuffix('weight')}{name}" for name in names]
        if keys[1] not in self._emulator.tensors:
            return None
        with self._emulator.slices(keys) as slices:
            tensors = [slices[key][...].to(weight.device) for key in keys]
        if packing:
            codes, scales = tensors
            return StandIn(PACKINGS[packing].unpack(codes, scales.to(weight.dtype), shape[1]))
        return self._format.read(tensors, shape, weight.dtype)

    def of_stack(self, path: str, weights: torch.Tensor) -> Iterator[StandIn | None]:
        """Yield what stands in for each expert's matrix; None where the emulator has the stack itself.

        Args:
            path: of the stack in the base.
            weights: (E, m, n).
        """
        keys = [part_name(path, name) for name in self._format.names()]
        if keys[0] not in self._emulator.tensors:
            yield from [None] * len(weights)
            return
        shape = (weights.shape[1], weights.shape[2])
        with self._emulator.slices(keys) as slices:
            for expert in range(len(weights)):
                tensors = [slices[key][expert].to(weights.device) for key in keys]
                yield self._format.read(tensors, shape, weights.dtype)
