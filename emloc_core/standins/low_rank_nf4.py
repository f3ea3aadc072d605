"""Factors in four bits, each fitted to the other as rounded, and seen as rounded by what is fitted after them."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from emloc_core.algorithms import feedback
from emloc_core.algorithms.factorize import Factors, output_error, wants_inputs
from emloc_core.algorithms.statistics import Gram, cheaper_side
from emloc_core.standins import nf4
from emloc_core.standins.format import Ratios
from emloc_core.standins.layer import Parts
from emloc_core.standins.low_rank import Factorize, RoundedLowRank, RoundedLowRankLinear


def unpack_factors(
    parts: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U, (m, k), and V, (k, n), of a weight of this shape, from their codes and scales, which tell k."""
    (u, u_scales, v, v_scales), (m, n) = parts, shape
    rank = (u.numel() + v.numel()) * 2 // (m + n)
    return nf4.unpack(u, u_scales, (m, rank), dtype), nf4.unpack(v, v_scales, (rank, n), dtype)


class FourBitLowRankLinear(RoundedLowRankLinear):
    """The layer of the kind low-rank-nf4: factors in four bits."""

    factor = staticmethod(nf4.unpack)
    factors = staticmethod(unpack_factors)

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:  # noqa: ARG003
        """Return codes and scales of both factors."""
        (m, n), k = shape, rank or 0
        return nf4.parts("weight", (m, k)) | nf4.parts("V", (k, n))


class FourBitLowRank(RoundedLowRank):
    """Factors in four bits."""

    name = "low-rank-nf4"
    layer = FourBitLowRankLinear
    ratios = Ratios(smallest=0.39)  # below, factors of twice the rank in two bits lose less

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[Factors]:
        """Round both factors with feedback."""
        factors = in_four_bits(self.factorize, weights, gram, ranks)
        matrix = feedback.single(gram)
        return [
            replace(found, error=output_error(weight, found.u @ found.v, matrix))
            for weight, found in zip(weights, factors, strict=True)
        ]

    def told(self, rank: str) -> str:
        """The rank of the factors, and their bits."""
        return f"rank {rank} in four bits"

    def pack(self, fitted: Factors, dtype: torch.dtype) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Return both factors' codes and scales."""
        return packed_factors("weight", fitted)


def packed_factors(name: str, factors: Factors) -> dict[str, torch.Tensor]:
    """Return codes and scales of U, which has this name, and of V."""
    found = {}
    for of, part in ((name, factors.u), ("V", factors.v)):
        found[of], found[f"{of}_scales"] = (tensor.cpu() for tensor in nf4.pack(part))
    return found


def in_four_bits(
    factorize: Factorize, weights: Sequence[torch.Tensor], inputs: Gram, ranks: Sequence[int | None]
) -> list[Factors]:
    """Round U with feedback, fit V to that by least squares, and round it with feedback.

    The inputs of U are those of the exact V. The best V for a given U has ``U V x`` nearest to ``W x`` for every x:
    ``V = (U^T U)^-1 U^T W``. The Gram that it takes is that of the inputs. It measures no error.
    """
    exact = [on_its_gram(factorize, weight, rank or 0, inputs) for weight, rank in zip(weights, ranks, strict=True)]
    inputs.narrow()
    matrix = feedback.single(inputs)
    us, vs = [], []
    for weight, of in zip(weights, exact, strict=True):
        inner = feedback.Damped(of.v.to(matrix) @ matrix @ of.v.to(matrix).T)
        u = rounded([of.u], inner)[0].double()
        us.append(u.float())
        vs.append(torch.linalg.solve(u.T @ u, u.T @ weight.to(u)))
    vs = rounded(vs, feedback.damped(inputs))
    return [replace(of, u=u, v=v) for of, u, v in zip(exact, us, vs, strict=True)]


def on_its_gram(factorize: Factorize, weight: torch.Tensor, rank: int, inputs: Gram) -> Factors:
    """Factorise on the Gram that the factorizer asks for, or on the smaller one; there is that of the inputs."""
    on_inputs = wants_inputs(factorize) or cheaper_side(weight.shape[0], weight.shape[1]) == "input"
    return factorize(weight, inputs if on_inputs else inputs.through(weight), rank)


def rounded(
    matrices: Sequence[torch.Tensor], gram: feedback.Damped, passes: int = feedback.PASSES
) -> list[torch.Tensor]:
    """Return matrices with the same inputs in four bits, as they are after being packed and unpacked.

    The scale of a block of numbers is that of its largest, which is kept as it is, so that packing finds it again.

    Args:
        matrices: M, (m, n), any floating dtype.
        gram: of their inputs.
        passes: of descent.

    Returns:
        Q, (m, n), in fp32: packing and unpacking gives it back unchanged.
    """
    matrices = [matrix.float() for matrix in matrices]
    spread, largest = (torch.cat(parts) for parts in zip(*map(_blocks, matrices), strict=True))
    found = nf4.to_scales(feedback.stacked(matrices), gram, spread, largest, passes)
    return [nf4.rounded(part) for part in found.split([len(matrix) for matrix in matrices])]


def _blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale of every number's block, and where the block's largest number is; both (m, n)."""
    size, count = matrix.shape, matrix.numel()
    padded = torch.nn.functional.pad(matrix.flatten(), (0, -count % nf4.BLOCK)).view(-1, nf4.BLOCK)
    scales, at = padded.abs().max(1, keepdim=True)
    largest = torch.zeros_like(padded, dtype=torch.bool).scatter_(1, at, value=True)
    return nf4.spread(scales.flatten(), size), largest.flatten()[:count].view(size)
