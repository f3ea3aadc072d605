"""Factors on four levels, two bits a number: for emulators in about a tenth of the base's memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms import feedback, levels
from emloc_core.algorithms.factorize import Factors, output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.standins.format import Ratios
from emloc_core.standins.layer import PackedLinear, Parts, product
from emloc_core.standins.levels import pack, parts, unpack
from emloc_core.standins.low_rank import RoundedLowRank
from emloc_core.standins.low_rank_nf4 import on_its_gram
from emloc_core.standins.standin import StandIn

_LEVELS = 4
#: Added to the diagonal of ``U^T U``, as a fraction of its mean: columns of a rounded U may be alike.
_RIDGE = 1e-6


class TwoBitLowRankLinear(PackedLinear):
    """``y = U (V x) + b``: ``weight`` is U and ``V`` is V, each on four levels beside its scales."""

    V: nn.Parameter
    weight_scales: nn.Parameter
    V_scales: nn.Parameter

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return codes and scales of both factors."""
        (m, n), k = shape, rank or 0
        return parts("weight", (m, k), _LEVELS, dtype) | parts("V", (k, n), _LEVELS, dtype)

    @staticmethod
    def unpack(*parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return ``U V``."""
        u, v = _unpacked(parts, shape, dtype)
        return u @ v

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        (m, n), k = self.shape, self.rank or 0
        inner = product(input, partial(unpack, dtype=self.dtype, shape=(k, n), count=_LEVELS), self.V, self.V_scales)
        of_u = partial(unpack, dtype=self.dtype, shape=(m, k), count=_LEVELS)
        found = product(inner, of_u, self.weight, self.weight_scales)
        return found if self.bias is None else found + self.bias


@dataclass(frozen=True)
class PackedFactors(Factors):
    """Factors as they are rounded, and packed.

    Attributes:
        parts: codes and scales, by the names of the layer's parameters.
    """

    parts: dict[str, torch.Tensor]


class TwoBitLowRank(RoundedLowRank):
    """Factors on four levels.

    The inputs of U, ``V x``, are uncorrelated, so that feedback could pass nothing on. A rotation at random between the
    factors correlates them, cancels and takes no memory: it halves the error of a block. (QuIP rotates weights
    themselves, and has to undo it: Chee et al., 2023, arXiv 2307.13304.)
    """

    name = "low-rank-2-bit"
    layer = TwoBitLowRankLinear
    ratios = Ratios(0.5, 0.01, 0.99)

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[Factors]:
        """Round U with feedback, fit V to that by least squares, and round it with feedback."""
        matrix = feedback.single(gram)
        exact = [
            on_its_gram(self.factorize, weight, rank or 0, gram) for weight, rank in zip(weights, ranks, strict=True)
        ]
        us, targets = [], []
        for weight, of in zip(weights, exact, strict=True):
            rotation = _rotation(of.u.shape[1]).to(of.u)
            inputs = (rotation.T @ of.v).to(matrix)
            of_u = feedback.Damped(inputs @ matrix @ inputs.T, levels.DAMPING)
            us.append(levels.rounded(of.u @ rotation, of_u, _LEVELS))
            targets.append(_best_v(us[-1].numbers().double(), weight))
        of_v = feedback.damped(gram, levels.DAMPING)
        vs = levels.rounded(torch.cat(targets), of_v, _LEVELS).split([len(v) for v in targets])
        found: list[Factors] = []
        for weight, of, u, v in zip(weights, exact, us, vs, strict=True):
            numbers = u.numbers(), v.numbers()
            error = output_error(weight, numbers[0] @ numbers[1], matrix)
            found.append(PackedFactors(*numbers, of.spectrum, pack(u) | pack(v, "V"), error=error))
        return found

    def pack(self, fitted: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Return both factors' codes and scales."""
        return {name: part.cpu() for name, part in fitted.parts.items()}

    def told(self, rank: str) -> str:
        """The rank of the factors, and their bits."""
        return f"rank {rank} in two bits"

    def read(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> StandIn:
        """Return both factors, unpacked."""
        return StandIn(*_unpacked(tensors, shape, dtype))


def _unpacked(
    parts: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U, (m, k), and V, (k, n), of a weight of this shape, from their codes and scales, which tell k."""
    (u, u_scales, v, v_scales), (m, n) = parts, shape
    rank = len(v_scales)
    return unpack(u, u_scales, dtype, (m, rank), _LEVELS), unpack(v, v_scales, dtype, (rank, n), _LEVELS)


def _best_v(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the V, (k, n), in fp32, with which U V is nearest to a weight, (m, n), whatever the inputs."""
    overlaps = u.T @ u
    overlaps.diagonal().add_(_RIDGE * overlaps.diagonal().mean())
    return torch.linalg.solve(overlaps, u.T @ weight.to(u)).float()


def _rotation(size: int) -> torch.Tensor:
    """Return an orthogonal matrix, (size, size), fp64, on the CPU: the same every time."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q
