"""Weights on three levels, plus low-rank factors of the rounding error in four bits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import nn

from emloc_core.algorithms import feedback, levels
from emloc_core.algorithms.factorize import output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.errors import EmlocError
from emloc_core.settings import CompressSettings
from emloc_core.standins import nf4
from emloc_core.standins.format import Factorize, Fit, Format, Pair, each, whole
from emloc_core.standins.layer import Parts, product
from emloc_core.standins.levels import FewLevelsLinear, MovableScales, PackedWeight, pack
from emloc_core.standins.low_rank_nf4 import in_four_bits, on_its_gram, packed_factors, unpack_factors

#: Of descent over the repair, which the next round fits again: more gain nothing.
_PASSES = 1


class RepairedLinear(FewLevelsLinear):
    """``y = W x + U (V x) + b``: W on three levels beside a low-rank repair of the rounding error, in four bits."""

    LEVELS = 3

    U: nn.Parameter
    V: nn.Parameter
    U_scales: nn.Parameter
    V_scales: nn.Parameter

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return codes and scales, of the weight and of both factors of its repair."""
        (m, n), k = shape, rank or 0
        return super().parts(shape, None, dtype) | nf4.parts("U", (m, k)) | nf4.parts("V", (k, n))

    @classmethod
    def unpack(cls, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return ``W + U V``."""
        u, v = unpack_factors(parts[2:], shape, dtype)
        return super().unpack(*parts[:2], shape=shape, dtype=dtype) + u @ v

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        (m, n), k = self.shape, self.rank or 0
        if input.numel() // n * (m + n) > m * n:  # of so many tokens, a product with the sum takes fewer operations
            return super().forward(input)
        weight = partial(super().unpack, shape=self.shape, dtype=self.dtype)
        inner = nf4.product(input, self.V, self.V_scales, (k, n), self.dtype)
        repair = nf4.product(inner, self.U, self.U_scales, (m, k), self.dtype)
        found = product(input, weight, self.weight, self.weight_scales)
        return (found if self.bias is None else found + self.bias) + repair


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


class RepairedThreeLevels(Format):
    """Weights on three levels with a low-rank repair in four bits (as in CALDERA, Saha et al., 2024, arXiv 2405.18886).

    Each is fitted in turn to what the other leaves of the weight, and seen as rounded by what is fitted after them.
    The ratio is that of the repair alone.
    """

    name = "1.6-bit+repair"
    layer = RepairedLinear
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
        return f"{self.layer.LEVELS} levels and rank {rank} in four bits"

    def pack(self, stand_in: Repaired, dtype: torch.dtype) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Return codes and scales, of the weight and of both factors."""
        weight = {"weight": stand_in.codes.cpu(), "weight_scales": stand_in.scales.cpu()}
        return weight | packed_factors("U", stand_in)

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return the sum of weight and repair, and the identity."""
        return whole(self.layer.unpack(*tensors, shape=shape, dtype=dtype))


def _in_turn(repair: Fit, rounds: int) -> Fit:
    """Return what rounds weights to three levels and factorises the errors, so many times."""

    def fit(weights: Sequence[torch.Tensor], inputs: Gram, ranks: Sequence[int]) -> list[Repaired]:
        rows = [len(weight) for weight in weights]
        gram, count = feedback.damped(inputs, levels.DAMPING), RepairedLinear.LEVELS
        stacked = left = torch.cat([weight.float() for weight in weights])
        scales = None
        for _ in range(rounds):
            found = levels.rounded(left, gram, count, scales)
            numbers, scales = found.numbers(), found.scales
            repairs = repair((stacked - numbers).split(rows), inputs, ranks)
            left = stacked - torch.cat([of.u.float() @ of.v.float() for of in repairs])
        matrix = feedback.single(inputs)
        return [
            Repaired(
                u := of.u.float(), v := of.v.float(), of.spectrum, *pack(part), count,
                error=output_error(weight.float(), kept.addmm(u, v), matrix),
            )
            for weight, of, part, kept in zip(weights, repairs, found.split(rows), numbers.split(rows), strict=True)
        ]  # fmt: skip

    return fit
