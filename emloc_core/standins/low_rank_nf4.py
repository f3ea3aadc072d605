"""Factors in four bits, each fitted to the other as rounded, and seen as rounded by what is fitted after them."""

from collections.abc import Sequence

import torch

from emloc_core.algorithms import feedback
from emloc_core.algorithms.factorize import output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.standins import nf4
from emloc_core.standins.format import Ratios
from emloc_core.standins.layer import Parts
from emloc_core.standins.low_rank import RoundedLowRank, RoundedLowRankLinear
from emloc_core.standins.standin import Packed


class FourBitLowRankLinear(RoundedLowRankLinear):
    """The layer of the kind low-rank-nf4: factors in four bits."""

    factor = staticmethod(nf4.unpack)

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return codes and scales of both factors."""
        (m, n), k = shape, rank or 0
        return nf4.parts("weight", (m, k)) | nf4.parts("V", (k, n))

    @classmethod
    def factors(
        cls, parts: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both, whose codes tell their rank."""
        (u, u_scales, v, v_scales), (m, n) = parts, shape
        rank = (u.numel() + v.numel()) * 2 // (m + n)
        return nf4.unpack(u, u_scales, (m, rank), dtype), nf4.unpack(v, v_scales, (rank, n), dtype)


class FourBitLowRank(RoundedLowRank):
    """Factors in four bits."""

    name = "low-rank-nf4"
    layer = FourBitLowRankLinear
    ratios = Ratios(smallest=0.39)  # below, factors of twice the rank in two bits lose less

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[Packed]:
        """Round U with feedback, fit V to that by least squares, and round it with feedback.

        The inputs of U are the outputs of the exact V. The best V for a rounded U has ``U V x`` nearest to ``W x`` for
        every x, ``V = (U^T U)^-1 U^T W``, and is rounded on the Gram of the inputs.
        """
        exact = self.exact(weights, gram, ranks)
        gram.narrow()
        matrix = feedback.single(gram)
        us, vs = [], []
        for weight, factors in zip(weights, exact, strict=True):
            us += rounded([factors.u], feedback.Damped(factors.v @ matrix @ factors.v.T))
            vs.append(best_v(us[-1].double(), weight))
        del exact, factors
        vs = rounded(vs, feedback.damped(gram))
        return [
            Packed(_packed(u, v), (len(u), v.shape[1]), output_error(weight, u @ v, matrix))
            for weight, u, v in zip(weights, us, vs, strict=True)
        ]

    def describe(self, rank: str) -> str:
        """The rank of the factors, and their bits."""
        return f"rank {rank} in four bits"


def _packed(u: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return codes and scales of both factors, on the CPU."""
    tensors = {}
    for key, part in (("weight", u), ("V", v)):
        tensors[key], tensors[f"{key}_scales"] = (tensor.cpu() for tensor in nf4.pack(part))
    return tensors


def best_v(u: torch.Tensor, weight: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
    """Return the V, (k, n), in fp32, with which U V is nearest to a weight, (m, n), whatever the inputs.

    Args:
        u: (m, k), in the dtype to compute in.
        ridge: added to the diagonal of ``U^T U``, as a fraction of its mean: columns of a rounded U may be alike.
    """
    overlaps = u.T @ u
    overlaps.diagonal().add_(ridge * overlaps.diagonal().mean())
    return torch.linalg.solve(overlaps, u.T @ weight.to(u)).float()


def rounded(matrices: Sequence[torch.Tensor], gram: feedback.Damped) -> list[torch.Tensor]:
    """Return matrices with the same inputs in four bits, as they are after being packed and unpacked.

    The scale of a block of numbers is its largest number, which is kept as it is, so that packing finds it again.

    Args:
        matrices: M, (m, n), any floating dtype.
        gram: of their inputs.

    Returns:
        Q, (m, n), in fp32: packing and unpacking leaves it unchanged.
    """
    matrices = [matrix.float() for matrix in matrices]
    spread, largest = (torch.cat(parts) for parts in zip(*map(_blocks, matrices), strict=True))
    quantized = nf4.to_scales(feedback.stacked(matrices), gram, spread, largest)
    return [nf4.rounded(part) for part in quantized.split([len(matrix) for matrix in matrices])]


def _blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale of every number's block, and where the block's largest number is; both (m, n)."""
    size, count = matrix.shape, matrix.numel()
    padded = torch.nn.functional.pad(matrix.flatten(), (0, -count % nf4.BLOCK)).view(-1, nf4.BLOCK)
    scales, index = padded.abs().max(1, keepdim=True)
    largest = torch.zeros_like(padded, dtype=torch.bool).scatter_(1, index, value=True)
    return nf4.spread(scales.flatten(), size), largest.flatten()[:count].view(size)
