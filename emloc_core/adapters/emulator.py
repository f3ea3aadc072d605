"""The emulator that a LoRA was trained on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.manifest import manifest_value, read_manifest
from emloc_core.standins import StandIn
from emloc_core.standins.experts import part_name
from emloc_core.standins.registry import format_of
from emloc_core.standins.vocabulary import PACKINGS, PARTS, packed_layers


class Emulator(Checkpoint):
    """An emulator: its manifest, and its stand-ins for the weights of the base, read one at a time.

    Args:
        adapter: directory of the LoRA, for messages.

    Raises:
        EmlocError: it is not there, is no emulator, or no plugin provides its format.
    """

    def __init__(self, directory: Path, adapter: Path) -> None:
        if not directory.is_dir():
            raise EmlocError(
                f"The emulator that {adapter} was trained on is not at {directory}.",
                "Give its directory with --emulator.",
                code="missing",
            )
        super().__init__(directory)
        self.manifest = read_manifest(directory) or {}
        if self.manifest.get("kind") != "emulator":
            raise EmlocError(
                f"{adapter} was trained on {directory}, which is not an emulator.",
                "Give the emulator that it was trained on with --emulator; without one, nothing needs a correction.",
                code="mismatch",
            )
        self._format, self._vocabulary = format_of(self.config), packed_layers(self.config)

    def entry(self, name: str, kind: Any) -> Any:
        """Return a part of its manifest, by its dotted name; see :func:`emloc_core.files.manifest.manifest_value`."""
        return manifest_value(self.manifest, self.directory, name, kind)

    def stand_in(self, key: str, path: str, weight: torch.Tensor) -> StandIn | None:
        """Return the stand-in for a weight; None where the emulator has the weight itself.

        Args:
            key: the weight's key in the base's checkpoint.
            weight: (m, n); the stand-in has its dtype and is on its device.
        """
        packing, shape = self._vocabulary.get(path), (weight.shape[0], weight.shape[1])
        names = PARTS if packing else self._format.names()
        keys = [f"{key.removesuffix('weight')}{name}" for name in names]
        if keys[1] not in self.tensors:
            return None
        with self.slices(keys) as slices:
            tensors = [slices[key][...].to(weight.device) for key in keys]
        if packing:
            codes, scales = tensors
            return StandIn(PACKINGS[packing].unpack(codes, scales.to(weight.dtype), shape[1]))
        return self._format.read(tensors, shape, weight.dtype)

    def stand_ins(self, path: str, weights: torch.Tensor) -> Iterator[StandIn | None]:
        """Yield the stand-in for each expert's matrix; None where the emulator has the stack itself.

        Args:
            path: the stack's path in the base.
            weights: (E, m, n).
        """
        keys = [part_name(path, name) for name in self._format.names()]
        if keys[0] not in self.tensors:
            yield from [None] * len(weights)
            return
        shape = (weights.shape[1], weights.shape[2])
        with self.slices(keys) as slices:
            for expert in range(len(weights)):
                tensors = [slices[key][expert].to(weights.device) for key in keys]
                yield self._format.read(tensors, shape, weights.dtype)
