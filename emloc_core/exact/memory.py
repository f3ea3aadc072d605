"""The memory of an exact step, by formula, from shapes alone (``docs/memory.md``)."""

from math import prod
from typing import TYPE_CHECKING

import torch

from emloc_core.exact.head import PIECES
from emloc_core.family import Family
from emloc_core.model.inside import Positions, hidden_size, inside
from emloc_core.model.lockstep import units
from emloc_core.plugins.manager import plugin_manager
from emloc_core.standins.experts import StandInExperts
from emloc_core.standins.layer import PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def step_need(
    model: "PreTrainedModel", family: Family, tokens: Positions, patches: Positions, dtype: torch.dtype
) -> dict[str, int]:
    """Return the bytes of an exact step by term, without the LoRA and its optimiser.

    Args:
        model: on the meta device.
        family: its declaration; its last tower is the language model's.
        tokens: positions that pass through the language model.
        patches: positions that pass through every other tower.
        dtype: dtype of the hidden states.

    Returns:
        - weights: the unit in use and the next one, in the largest pair of neighbours.
        - boundaries: the hidden states before every block, of all positions of a tower.
        - ends: the hidden states behind the last block, and their gradient.
        - activations: the activations of one block for one micro-batch, in the tower where they are largest.
        - unpacked: the largest matrix of an emulator whose weights are packed, as it is computed with, or as many
            experts as are unpacked at a time.
        - logits: one piece of them, as large as on a GPU, in fp32, with its gradient.
    """
    lists = [tower.blocks for tower in family.towers]
    paths = units(model, lists)
    sizes = [sum(p.numel() * p.itemsize for p in model.get_submodule(unit).parameters()) for unit in paths]
    inner, boundaries, ends, activations = inside(model, family), 0, 0, 0
    for tower in family.towers:
        positions = tokens if tower.blocks == lists[-1] else patches
        sizes_inside = [size.backward for path, size in inner.items() if path.startswith(f"{tower.blocks}.")]
        hidden = positions.all * hidden_size(model.get_submodule(tower.blocks))
        boundaries, ends = boundaries + len(sizes_inside) * hidden, ends + 2 * hidden
        activations = max([activations, *(positions.at_once * size for size in sizes_inside)])
    packed = [dtype.itemsize * prod(module.shape) for module in model.modules() if isinstance(module, PackedLinear)]
    packed += [module.unpacked_bytes for module in model.modules() if isinstance(module, StandInExperts)]
    vocabulary = plugin_manager().objective_of(family).vocabulary(model.config)
    return {
        "weights": max(a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True)),
        "boundaries": boundaries * dtype.itemsize,
        "ends": ends * dtype.itemsize,
        "activations": activations * dtype.itemsize,
        "unpacked": max(packed, default=0),
        "logits": 8 * min(max(PIECES.values()), tokens.at_once * vocabulary),
    }


def lora_need(parameters: int) -> int:
    """Return the bytes of a LoRA of so many parameters, in fp32: values, gradients, and the optimiser's two moments."""
    return 4 * 4 * parameters
