"""Factors on four levels, two bits a number: for emulators in about a tenth of the base's memory."""

from collections.abc import Sequence

import torch

from emloc_core.algorithms import feedback, levels
from emloc_core.algorithms.factorize import output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.standins.format import Ratios
from emloc_core.standins.layer import Parts
from emloc_core.standins.levels import pack, parts, unpack
from emloc_core.standins.low_rank import RoundedLowRank, RoundedLowRankLinear
from emloc_core.standins.low_rank_nf4 import best_v
from emloc_core.standins.standin import Packed

_LEVELS = 4
#: Steadies the fit of V to U, see :func:`best_v`.
_RIDGE = 1e-6


class TwoBitLowRankLinear(RoundedLowRankLinear):
    """The layer of the kind low-rank-2-bit: factors on four levels."""

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return codes and scales of both factors."""
        (m, n), k = shape, rank or 0
        return parts("weight", (m, k), _LEVELS, dtype) | parts("V", (k, n), _LEVELS, dtype)

    @staticmethod
    def factor(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return one factor."""
        return unpack(codes, scales, dtype, shape, _LEVELS)

    @classmethod
    def factors(
        cls, parts: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both; V has a row of scales for each of its rows."""
        (u, u_scales, v, v_scales), (m, n) = parts, shape
        rank = len(v_scales)
        return cls.factor(u, u_scales, (m, rank), dtype), cls.factor(v, v_scales, (rank, n), dtype)


class TwoBitLowRank(RoundedLowRank):
    """Factors on four levels.

    The inputs of U, ``V x``, are uncorrelated, so that feedback could pass nothing on. A rotation at random between the
    factors correlates them, cancels and takes no memory: it halves the error of a block. (QuIP rotates weights
    themselves, and has to undo it: Chee et al., 2023, arXiv 2307.13304.)
    """

    name = "low-rank-2-bit"
    layer = TwoBitLowRankLinear
    ratios = Ratios(0.5)

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[Packed]:
        """Round U with feedback, fit V to that by least squares, and round it with feedback."""
        exact = self.exact(weights, gram, ranks)
        gram.narrow()
        matrix = feedback.single(gram)
        us, targets = [], []
        for weight, factors in zip(weights, exact, strict=True):
            rotation = _rotation(factors.u.shape[1]).to(factors.u)
            inputs = rotation.T @ factors.v
            u_gram = feedback.Damped(inputs @ matrix @ inputs.T, levels.DAMPING)
            us.append(levels.rounded(factors.u @ rotation, u_gram, _LEVELS))
            targets.append(best_v(us[-1].numbers().double(), weight, _RIDGE))
        del exact, factors
        v_gram = feedback.damped(gram, levels.DAMPING)
        vs = levels.rounded(feedback.stacked(targets), v_gram, _LEVELS).split([len(v) for v in targets])
        fitted = []
        for weight, u, v in zip(weights, us, vs, strict=True):
            error = output_error(weight, u.numbers() @ v.numbers(), matrix)
            fitted.append(Packed(pack(u) | pack(v, "V"), (weight.shape[0], weight.shape[1]), error))
        return fitted

    def describe(self, rank: str) -> str:
        """The rank of the factors, and their bits."""
        return f"rank {rank} in two bits"


def _rotation(size: int) -> torch.Tensor:
    """Return an orthogonal matrix, (size, size), fp64, on the CPU: the same every time."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q
