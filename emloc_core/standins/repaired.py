"""Weights on three levels, plus low-rank factors of the rounding error in four bits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from emloc_core.algorithms import feedback, levels
from emloc_core.algorithms.factorize import Factors, factorize, leading, output_error, wants_inputs
from emloc_core.algorithms.statistics import Gram
from emloc_core.errors import EmlocError
from emloc_core.settings import CompressSettings
from emloc_core.standins import costs, nf4
from emloc_core.standins.costs import Planned
from emloc_core.standins.format import Format, RankingFormat, Ratios
from emloc_core.standins.layer import Parts, product
from emloc_core.standins.levels import FewLevelsLinear, MovableScales, pack, unpack
from emloc_core.standins.low_rank import Factorize
from emloc_core.standins.low_rank_nf4 import on_its_gram, packed_factors, rounded, unpack_factors
from emloc_core.standins.standin import Packed, StandIn

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
        return super().unpack(*parts[:2], shape=shape, dtype=dtype).add_(u @ v)

    @classmethod
    def unpack_stack(cls, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return ``W + U V`` of all, the sums one by one."""
        found = super().unpack_stack(*parts[:2], shape=shape, dtype=dtype)
        for at, *of in zip(range(len(found)), *parts[2:], strict=True):
            u, v = unpack_factors(of, shape, dtype)
            found[at].add_(u @ v)
        return found

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


class RepairedThreeLevels(Format):
    """Weights on three levels with a low-rank repair in four bits (as in CALDERA, Saha et al., 2024, arXiv 2405.18886).

    Each is fitted in turn to what the other leaves of the weight, and seen as rounded by what is fitted after them.
    The ratio is that of the repair alone.
    """

    name = "1.6-bit+repair"
    layer = RepairedLinear
    ratios = Ratios(0.23, 0.2, 0.5)
    samples = 256
    refine = 0
    experts = True
    narrow = True
    factorize: Factorize = staticmethod(factorize)

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
        """Round the weight and factorise the error, then each again, fitted to what the other leaves."""

        matrix = feedback.single(gram)
        directions: list[torch.Tensor | None] = [None] * len(weights)

        def repairing(left: Sequence[torch.Tensor]) -> list[Factors]:
            """Begin with the directions of the round before; their inputs are uncorrelated, so U needs no feedback."""
            sought = zip(left, ranks, directions, strict=True)
            found = [leading(weight, matrix, rank or 0, before) for weight, rank, before in sought]
            directions[:] = found
            us = [nf4.rounded(u) for u in found]
            vs = [torch.linalg.solve(u.T @ u, u.T @ weight) for u, weight in zip(us, left, strict=True)]
            vs = rounded(vs, feedback.damped(gram), _PASSES)
            return [Factors(u, v, torch.zeros(min(len(u), v.shape[1]))) for u, v in zip(us, vs, strict=True)]

        return [
            Packed(pack(part) | packed_factors("U", of.u, of.v), (weight.shape[0], weight.shape[1]), error)
            for weight, part, of, error in _in_turn(weights, gram, repairing, _ROUNDS)
        ]

    def ranking(self) -> RankingFormat:
        """Return factors of the error of rounding once."""
        found = _Residual()
        found.factorize = self.factorize
        return found

    def movable(self, fitted: Packed) -> MovableScales:
        """Let the scales move, and not the repair."""
        codes, _, *factors = (fitted.parts[name] for name in self.names())
        u, v = unpack_factors([part.to(codes.device) for part in factors], fitted.shape, torch.float32)
        repair = u @ v

        def unpacked(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return unpack(codes, scales, dtype, fitted.shape, self.layer.LEVELS) + repair.to(dtype)

        return MovableScales(fitted, unpacked)

    def told(self, rank: str) -> str:
        """The levels of the weight, and the rank of its repair."""
        return f"{self.layer.LEVELS} levels and rank {rank} in four bits"

    def numbers(self, shape: tuple[int, int], rank: int | None) -> int:
        """Those of the weight, and of its repair."""
        return super().numbers(shape, rank) + (rank or 0) * sum(shape)

    def spared(self, shape: tuple[int, int], rank: int | None, inputs: int) -> int:
        """Those of the repair, but its factors': many inputs are multiplied by the sum."""
        return (rank or 0) * max(0, inputs * sum(shape) - shape[0] * shape[1])

    def fitting_bytes(self, linears: Sequence[Planned], *, propagated: bool, itemsize: int) -> int:  # noqa: ARG002
        """Those of rounding beside factors, which :func:`leading` finds beside the Gram and without another."""
        return _rounding_bytes(linears)


@dataclass(frozen=True)
class _ResidualFactors(Factors):
    """Factors of the rounding error of a weight, beside what it was rounded to, (m, n)."""

    kept: torch.Tensor


class _Residual(RankingFormat):
    """Weights on three levels, and factors of the error in full precision."""

    name = "1.6-bit+repair"
    layer = RepairedLinear
    factorize: Factorize = staticmethod(factorize)

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[_ResidualFactors]:
        """Round once, and factorise the error."""

        def repairing(left: Sequence[torch.Tensor]) -> list[Factors]:
            pairs = zip(left, ranks, strict=True)
            return [on_its_gram(self.factorize, weight, rank or 0, gram) for weight, rank in pairs]

        return [
            _ResidualFactors(of.u, of.v, of.spectrum, part.numbers(), error=error)
            for _weight, part, of, error in _in_turn(weights, gram, repairing, 1)
        ]

    def cut(self, fitted: _ResidualFactors, rank: int) -> StandIn:
        """Return the rounded weight with a repair of that rank."""
        return StandIn(fitted.kept + fitted.u[:, :rank] @ fitted.v[:rank])

    def fitted_bytes(self, linears: Sequence[Planned], dtype: torch.dtype) -> int:  # noqa: ARG002
        """What weights are rounded to and factors, in fp32."""
        shapes = [(each.out_features, each.in_features, each.rank or 0) for each in linears]
        return 4 * sum(m * n + k * (m + n) for m, n, k in shapes)

    def fitting_bytes(self, linears: Sequence[Planned], *, propagated: bool, itemsize: int) -> int:  # noqa: ARG002
        """Those of factorising, and of rounding beside factors."""
        smaller = not wants_inputs(self.factorize)
        return costs.factoring_bytes(linears, propagated=propagated, smaller=smaller) + _rounding_bytes(linears)


def _rounding_bytes(linears: Sequence[Planned]) -> int:
    # The Gram, and a factor of it as damped for the weight and one for the repair.
    return costs.rounding_bytes(linears, grams=3, at_once=5, scales=True)


def _in_turn(
    weights: Sequence[torch.Tensor],
    inputs: Gram,
    repairing: Callable[[Sequence[torch.Tensor]], list[Factors]],
    rounds: int,
) -> Iterator[tuple[torch.Tensor, levels.Rounded, Factors, float]]:
    """Round weights to three levels, and factorise the errors, so many times.

    Yields:
        Each weight, what it is rounded to, the factors beside that, and the relative error of the outputs.
    """
    rows = [len(weight) for weight in weights]
    gram = feedback.damped(inputs, levels.DAMPING)
    stacked = feedback.stacked(weights)
    left, scales = stacked.clone(), None
    for _ in range(rounds):
        found = levels.rounded(left, gram, RepairedLinear.LEVELS, scales)
        scales = found.scales
        torch.sub(stacked, found.numbers(), out=left)
        repairs = repairing(left.split(rows))
        left.copy_(stacked)
        for part_left, of in zip(left.split(rows), repairs, strict=True):
            part_left.addmm_(of.u, of.v, alpha=-1)
    del stacked, left
    matrix = feedback.single(inputs)
    for weight, of, part in zip(weights, repairs, found.split(rows), strict=True):
        yield weight, part, of, output_error(weight, part.numbers().addmm_(of.u, of.v), matrix)
