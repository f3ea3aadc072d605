"""Factors on four levels, two bits a number: for emulators in about a tenth of the base's memory."""

from collections.abc import Sequence
from functools import cache

import torch
from torch.nn import functional

from emloc_core.algorithms import feedback, levels, native
from emloc_core.algorithms.factorize import output_error
from emloc_core.algorithms.levels import LEVELS
from emloc_core.algorithms.scales import GROUP, lookup, spread
from emloc_core.algorithms.statistics import Gram
from emloc_core.standins.format import Ratios
from emloc_core.standins.layer import Parts
from emloc_core.standins.low_rank import RoundedLowRank, RoundedLowRankLinear
from emloc_core.standins.low_rank_nf4 import best_v
from emloc_core.standins.standin import Packed
from emloc_core.standins.unpacking import is_compiled

#: Numbers of a byte, of which the first has the lowest bits.
_DIGITS = 4
#: Steadies the fit of V to U, see :func:`best_v`.
_RIDGE = 1e-6


class TwoBitLowRankLinear(RoundedLowRankLinear):
    """The layer of the kind low-rank-2-bit: factors on four levels."""

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return codes and scales of both factors."""
        (m, n), k = shape, rank or 0
        return _parts("weight", (m, k), dtype) | _parts("V", (k, n), dtype)

    @staticmethod
    def factor(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return one factor."""
        if is_compiled(codes, scales, dtype):
            return unpack_levels(codes.contiguous(), scales.contiguous(), dtype, *shape)
        return _by_torch(codes, scales, dtype, *shape)

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
            u_gram = feedback.Damped(inputs @ matrix @ inputs.T, feedback.MORE_DAMPING)
            us.append(levels.rounded(factors.u @ rotation, u_gram))
            targets.append(best_v(us[-1].numbers().double(), weight, _RIDGE))
        del exact, factors
        v_gram = feedback.damped(gram, feedback.MORE_DAMPING)
        vs = levels.rounded(feedback.stacked(targets), v_gram).split([len(v) for v in targets])
        fitted = []
        for weight, u, v in zip(weights, us, vs, strict=True):
            error = output_error(weight, u.numbers() @ v.numbers(), matrix)
            fitted.append(Packed(_packed("weight", u) | _packed("V", v), (weight.shape[0], weight.shape[1]), error))
        return fitted

    def describe(self, rank: str) -> str:
        """The rank of the factors, and their bits."""
        return f"rank {rank} in two bits"


def _rotation(size: int) -> torch.Tensor:
    """Return an orthogonal matrix, (size, size), fp64, on the CPU: the same every time."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def _parts(name: str, shape: tuple[int, int], dtype: torch.dtype) -> Parts:
    """Return what a layer keeps of a factor of this name and shape, to be unpacked to a dtype."""
    _table(dtype)  # there already where a pass is traced without contents
    m, n = shape
    return {
        name: ((-(-m * n // _DIGITS), 1), torch.uint8),
        f"{name}_scales": ((m, -(-n // GROUP)), torch.bfloat16),
    }


def _packed(name: str, rounded: levels.Rounded) -> dict[str, torch.Tensor]:
    """Return codes, (bytes, 1), uint8, and the scales, (m, ceil(n / GROUP)), bf16, by their names in the layer."""
    flat = rounded.indices.flatten()
    flat = functional.pad(flat, (0, -len(flat) % _DIGITS)).view(-1, _DIGITS)
    places = len(LEVELS) ** torch.arange(_DIGITS, dtype=torch.uint8, device=flat.device)
    return {name: (flat * places).sum(1, dtype=torch.uint8)[:, None], f"{name}_scales": rounded.scales}


@torch.library.custom_op("emloc::unpack_levels", mutates_args=())
def unpack_levels(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    """Unpack in one pass what is contiguous: a factor, (m, n), or a stack of them."""
    if feedback.takes_triton(codes.device):
        from emloc_core.standins import kernels

        return kernels.unpack_levels(codes, scales, dtype, m, n)
    if native.library(native.UNPACKING):
        return native.unpack_levels(codes, scales, _table(dtype).float(), n, GROUP, dtype)
    return _by_torch(codes, scales, dtype, m, n)


@unpack_levels.register_fake
def _(codes: torch.Tensor, _scales: torch.Tensor, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    return codes.new_empty(*codes.shape[:-2], m, n, dtype=dtype)


def _by_torch(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    table = _table(dtype).to(codes.device, non_blocking=True)
    numbers = lookup(table, codes.flatten()).view(*codes.shape[:-2], -1)[..., : m * n]
    return numbers.unflatten(-1, (m, n)) * spread(scales.to(dtype), n)


@cache
def _table(dtype: torch.dtype) -> torch.Tensor:
    """Return the levels that every byte stands for, (256, 4), on the CPU."""
    values = torch.tensor(LEVELS, dtype=dtype, device="cpu")
    places = len(LEVELS) ** torch.arange(_DIGITS, device="cpu")
    return values[torch.arange(256, device="cpu")[:, None] // places % len(LEVELS)]
