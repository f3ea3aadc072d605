"""Weights on three levels, plus low-rank factors of the rounding error in four bits."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from emloc_core.algorithms import feedback, levels
from emloc_core.algorithms.factorize import leading, output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.errors import EmlocError
from emloc_core.settings import CompressSettings
from emloc_core.standins import costs, nf4
from emloc_core.standins.costs import Planned
from emloc_core.standins.format import Format, Ratios
from emloc_core.standins.layer import Parts, product
from emloc_core.standins.levels import FewLevelsLinear, pack
from emloc_core.standins.low_rank_nf4 import packed_factors, rounded, unpack_factors
from emloc_core.standins.standin import Packed

#: How often the weight and its repair are fitted in turn.
_ROUNDS = 4
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
        return super().unpack(*parts[:2], shape=shape, dtype=dtype).addmm_(u, v)

    @classmethod
    def unpack_stack(cls, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return ``W + U V`` of all, the sums one by one."""
        weights = super().unpack_stack(*parts[:2], shape=shape, dtype=dtype)
        for index, *factors in zip(range(len(weights)), *parts[2:], strict=True):
            u, v = unpack_factors(factors, shape, dtype)
            weights[index].addmm_(u, v)
        return weights

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        (m, n), k = self.shape, self.rank or 0
        if input.numel() // n * (m + n) > m * n:  # of so many tokens, a product with the sum takes fewer operations
            return super().forward(input)
        weight = partial(super().unpack, shape=self.shape, dtype=self.dtype)
        inner = nf4.product(input, self.V, self.V_scales, (k, n), self.dtype)
        repair = nf4.product(inner, self.U, self.U_scales, (m, k), self.dtype)
        output = product(input, weight, self.weight, self.weight_scales)
        return (output if self.bias is None else output + self.bias) + repair


class RepairedThreeLevels(Format):
    """Weights on three levels with a low-rank repair in four bits (as in CALDERA, Saha et al., 2024, arXiv 2405.18886).

    Each is fitted in turn to what the other leaves of the weight, and seen as rounded by what is fitted after them.
    The ratio is the repair's alone.
    """

    name = "1.6-bit+repair"
    layer = RepairedLinear
    ratios = Ratios(0.23, 0.2, 0.5)
    samples = 256
    experts = True
    narrow = True

    def check(self, settings: CompressSettings) -> None:
        """Refuse a repair that saves next to nothing over weights in four bits.

        Raises:
            EmlocError: names the setting.
        """
        super().check(settings)
        if settings.ratio and settings.ratio > self.ratios.largest:
            raise EmlocError(
                f"With a repair of ratio {settings.ratio:g}, weights on three levels are hardly smaller than weights "
                "in four bits.",
                f"Give --ratio {self.ratios.default:g}, say, and at most {self.ratios.largest:g}; or --kind nf4.",
            )

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[Packed]:
        """Round the weights and factorise the errors, then each again, fitted to what the other leaves."""
        rows = [len(weight) for weight in weights]
        matrix, damped = feedback.single(gram), feedback.damped(gram, levels.DAMPING)
        stacked = feedback.stacked(weights)
        residual, scales = stacked.clone(), None
        directions: list[torch.Tensor | None] = [None] * len(weights)  # each round begins with those of the one before
        for _ in range(_ROUNDS):
            quantized = levels.rounded(residual, damped, RepairedLinear.LEVELS, scales)
            scales = quantized.scales
            torch.sub(stacked, quantized.numbers(), out=residual)
            starts = zip(residual.split(rows), ranks, directions, strict=True)
            directions[:] = us = [leading(error, matrix, rank or 0, before) for error, rank, before in starts]
            repairs = _rounded_factors(us, residual.split(rows), gram)
            residual.copy_(stacked)
            for part_residual, (u, v) in zip(residual.split(rows), repairs, strict=True):
                part_residual.addmm_(u, v, alpha=-1)
        del stacked, residual
        fitted = []
        for weight, part, (u, v) in zip(weights, quantized.split(rows), repairs, strict=True):
            error = output_error(weight, part.numbers().addmm_(u, v), matrix)
            fitted.append(Packed(pack(part) | packed_factors("U", u, v), (weight.shape[0], weight.shape[1]), error))
        return fitted

    def describe(self, rank: str) -> str:
        """The levels of the weight, and the rank of its repair."""
        return f"{self.layer.LEVELS} levels and rank {rank} in four bits"

    def numbers(self, shape: tuple[int, int], rank: int | None) -> int:
        """The numbers of the weight and of its repair."""
        return super().numbers(shape, rank) + (rank or 0) * sum(shape)

    def spared(self, shape: tuple[int, int], rank: int | None, inputs: int) -> int:
        """The repair's numbers per input, less those of computing ``U V``: many inputs are multiplied by the sum."""
        return (rank or 0) * max(0, inputs * sum(shape) - shape[0] * shape[1])

    def fitting_bytes(self, linears: Sequence[Planned], *, propagated: bool, itemsize: int) -> int:
        """The peak of rounding beside factors, which :func:`leading` finds beside the Gram and without another.

        There are the Gram, and its damped factors for the weight and for the repair.
        """
        return costs.rounding_bytes(linears, grams=3, at_once=5, scales=True)


def _rounded_factors(
    us: Sequence[torch.Tensor], errors: Sequence[torch.Tensor], gram: Gram
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return U and V of each error, as they are in four bits. U needs no feedback: its inputs are uncorrelated."""
    us = [nf4.rounded(u) for u in us]
    vs = [torch.linalg.solve(u.T @ u, u.T @ error) for u, error in zip(us, errors, strict=True)]
    return list(zip(us, rounded(vs, feedback.damped(gram), _PASSES), strict=True))
