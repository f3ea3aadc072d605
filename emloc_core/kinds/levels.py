"""Kinds whose stand-in is the weight itself, on a few levels: fewer than four bits a number."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from emloc_core.algorithms import feedback, levels
from emloc_core.algorithms.factorize import Factors, output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.kinds.kind import Factorize, Fit, Kind, Pair, beside, whole
from emloc_core.layers import LEVELS_VERSION, METHOD, replace_linears


@dataclass(frozen=True)
class PackedWeight(Factors):
    """A weight on a few levels: as U or V, beside the identity, and packed.

    Attributes:
        codes, scales: see :meth:`emloc_core.algorithms.levels.Rounded.pack`.
        count: number of levels.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    count: int

    def weight(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what the Linear multiplies by, (m, n), with these scales in place of its own."""
        return levels.unpack(self.codes, scales, (self.u.shape[0], self.v.shape[1]), self.count, dtype)

    def with_scales(self, scales: torch.Tensor) -> Self:
        """Return it with these scales in place of its own."""
        u, v = whole(self.weight(scales, torch.float32))
        return replace(self, u=u, v=v, scales=scales)


def packed(found: levels.Rounded, error: float) -> PackedWeight:
    """Return a rounded weight that nothing is beside."""
    numbers = found.numbers()
    nothing = torch.zeros(min(numbers.shape), dtype=torch.float64)
    return PackedWeight(*whole(numbers), nothing, *found.pack(), found.levels, error=error)


class MovableScales:
    """A weight on a few levels whose scales may still move, by their logarithms.

    Args:
        packed: the weight.
    """

    def __init__(self, packed: PackedWeight) -> None:
        self._packed = packed
        self.numbers = nn.Parameter(packed.scales.float().log())

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight with the scales as they are now."""
        return self._packed.weight(self.numbers.exp().bfloat16(), dtype)

    def settled(self) -> PackedWeight:
        """Return it packed."""
        return self._packed.with_scales(self.numbers.detach().exp().bfloat16())


class FewLevels(Kind):
    """Weights on a few levels, rounded with feedback, and seen as rounded by what is fitted after them.

    Attributes:
        levels: how many; a key of :data:`emloc_core.algorithms.levels.LEVELS`.
    """

    has_factors = False
    keeps_weight = True
    calibration = "propagated"
    taps_inputs = True
    refine = 3
    levels: int

    def rounding(self, factorize: Factorize) -> Fit:  # noqa: ARG002
        """Return what rounds weights with feedback, whatever their rank."""

        def fit(weights: Sequence[torch.Tensor], inputs: Gram, ranks: Sequence[int]) -> list[PackedWeight]:  # noqa: ARG001
            gram = feedback.damped(inputs, levels.damping(self.levels))
            whole_found = levels.rounded(torch.cat(list(weights)), gram, self.levels)
            matrix = feedback.single(inputs)
            return [
                packed(found, output_error(weight, found.numbers(), matrix))
                for weight, found in zip(weights, whole_found.split([len(weight) for weight in weights]), strict=True)
            ]

        return fit

    def movable(self, stand_in: PackedWeight) -> MovableScales:
        """Let the scales move."""
        return MovableScales(stand_in)

    def told(self, rank: str) -> str:  # noqa: ARG002
        """The number of levels, whatever the rank."""
        return f"{self.levels} levels"

    def keys(self, weight: str) -> list[str]:
        """The codes replace the weight."""
        return beside(weight, "weight_scales")

    def pack(self, weight: str, stand_in: PackedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Return the codes and scales."""
        return dict(zip(self.keys(weight), (stand_in.codes.cpu(), stand_in.scales.cpu()), strict=True))

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return the weight and the identity."""
        codes, scales = tensors
        return whole(levels.unpack(codes, scales, shape, self.levels, dtype))

    def config(self, ranks: dict[str, int], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:  # noqa: ARG002
        """Say how many levels which Linears have; :mod:`emloc_core.lowrank` loads them."""
        return {"quant_method": METHOD, "format_version": LEVELS_VERSION, "levels": dict.fromkeys(ranks, self.levels)}

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:  # noqa: ARG002
        """Several codes a byte, and two bytes for the scale of every 256 numbers of a row."""
        return levels.level_bytes(self.levels, shape)

    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Replace by the layers that an emulator has."""
        replace_linears(model, dict.fromkeys(ranks, self.levels), LEVELS_VERSION)


class SixLevels(FewLevels):
    """2.7 bits a number."""

    name = "2.7-bit"
    samples = 256
    levels = 6
