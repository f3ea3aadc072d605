"""The kind whose stand-in is the weight on three levels, plus low-rank factors of the rounding error in four bits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from emloc_core.algorithms import feedback, levels, nf4
from emloc_core.algorithms.factorize import output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.errors import EmlocError
from emloc_core.kinds.factors import in_four_bits, on_its_gram
from emloc_core.kinds.kind import Factorize, Fit, Kind, Pair, beside, each, whole
from emloc_core.kinds.levels import MovableScales, PackedWeight
from emloc_core.layers import METHOD, REPAIRED_VERSION, replace_linears
from emloc_core.quantised import RepairedLinear
from emloc_core.settings import CompressSettings

_LEVELS = RepairedLinear.LEVELS
#: What they are rounded with: see ``docs/decisions/0020-six-levels-have-more-damping.md``.
_DAMPING = 0.1
#: Of descent over the repair, which the next round fits again: more gain nothing.
_PASSES = 1


@dataclass(frozen=True)
class Repaired(PackedWeight):
    """A weight on a few levels, packed, with factors of the rounding error in fp32, as they are in four bits."""

    def pair(self) -> Pair:
        """Return the sum of weight and repair, beside the identity."""
        return whole(self.weight(self.scales, torch.float32))

    def weight(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what the Linear multiplies by, (m, n), with these scales in place of its own."""
        return super().weight(scales, dtype) + (self.u @ self.v).to(dtype)

    def with_scales(self, scales: torch.Tensor) -> Self:
        """Return it with these scales in place of its own; the repair stays."""
        return replace(self, scales=scales)


class RepairedThreeLevels(Kind):
    """Weights on three levels with a low-rank repair in four bits (as in CALDERA, Saha et al., 2024, arXiv 2405.18886).

    Each is fitted in turn to what the other leaves of the weight, and seen as rounded by what is fitted after them.
    The ratio is that of the repair alone.
    """

    name = "1.6-bit+repair"
    taps_inputs = keeps_weight = True
    ratio = 0.23
    smallest_ratio, largest_ratio = 0.2, 0.5
    calibration = "propagated"
    samples = 256
    rounds = 4
    refine = 0

    def check(self, settings: CompressSettings) -> None:
        """Refuse a repair that saves next to nothing over weights in four bits.

        Raises:
            EmlocError: names the setting.
        """
        super().check(settings)
        if settings.ratio and settings.ratio > self.largest_ratio:
            raise EmlocError(
                f"With a repair of ratio {settings.ratio:g}, weights on three levels are hardly smaller than weights "
                "in four bits.",
                f"Give --ratio {self.ratio:g}, say, and at most {self.largest_ratio:g}; or --kind nf4.",
            )

    def rounding(self, factorize: Factorize) -> Fit:
        """Round the weight and factorise the error, then each again, fitted to what the other leaves."""
        return _in_turn(in_four_bits(factorize, _PASSES), self.rounds)

    def decomposing(self, factorize: Factorize) -> Fit:
        """Decompose the error of rounding the weight once."""
        return _in_turn(each(lambda weight, gram, rank: on_its_gram(factorize, weight, rank, gram)), 1)

    def movable(self, stand_in: Repaired) -> MovableScales:
        """Let the scales move, and not the repair."""
        return MovableScales(stand_in)

    def told(self, rank: str) -> str:
        """The levels of the weight, and the rank of its repair."""
        return f"{_LEVELS} levels and rank {rank} in four bits"

    def keys(self, weight: str) -> list[str]:
        """The codes replace the weight."""
        return beside(weight, "weight_scales", "U", "U_scales", "V", "V_scales")

    def pack(self, weight: str, stand_in: Repaired, dtype: torch.dtype) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Return codes and scales, of the weight and of both factors."""
        parts = (stand_in.codes, stand_in.scales, *nf4.pack(stand_in.u), *nf4.pack(stand_in.v))
        return dict(zip(self.keys(weight), (part.cpu() for part in parts), strict=True))

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return the sum of weight and repair, and the identity."""
        codes, scales, u, u_scales, v, v_scales = tensors
        u, v = nf4.unpack_factors(u, u_scales, v, v_scales, shape, dtype)
        return whole(levels.unpack(codes, scales, shape, _LEVELS, dtype) + u @ v)

    def config(self, ranks: dict[str, int], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:  # noqa: ARG002
        """Say which Linears are repaired; :mod:`emloc_core.lowrank` loads them."""
        return {"quant_method": METHOD, "format_version": REPAIRED_VERSION, "ranks": ranks}

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:  # noqa: ARG002
        """Those of a weight on three levels, and of factors in four bits."""
        return levels.level_bytes(_LEVELS, shape) + nf4.factor_bytes(shape, rank)

    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Replace by the layers that an emulator has."""
        replace_linears(model, ranks, REPAIRED_VERSION)


def _in_turn(repair: Fit, rounds: int) -> Fit:
    """Return what rounds weights to three levels and factorises the errors, so many times."""

    def fit(weights: Sequence[torch.Tensor], inputs: Gram, ranks: Sequence[int]) -> list[Repaired]:
        rows = [len(weight) for weight in weights]
        gram = feedback.damped(inputs, _DAMPING)
        stacked = left = torch.cat([weight.float() for weight in weights])
        scales = None
        for _ in range(rounds):
            found = levels.rounded(left, gram, _LEVELS, scales)
            numbers, scales = found.numbers(), found.scales
            repairs = repair((stacked - numbers).split(rows), inputs, ranks)
            left = stacked - torch.cat([of.u.float() @ of.v.float() for of in repairs])
        matrix = feedback.single(inputs)
        return [
            Repaired(
                u := of.u.float(), v := of.v.float(), of.spectrum, *part.pack(), _LEVELS,
                error=output_error(weight.float(), kept.addmm(u, v), matrix),
            )
            for weight, of, part, kept in zip(weights, repairs, found.split(rows), numbers.split(rows), strict=True)
        ]  # fmt: skip

    return fit
