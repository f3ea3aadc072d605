"""Kinds whose stand-in is two factors: in the dtype of the base, and in four bits."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms import feedback, nf4
from emloc_core.algorithms.factorize import Factors, output_error, wants_inputs
from emloc_core.algorithms.statistics import Gram, cheaper_side
from emloc_core.kinds.kind import Factorize, Fit, Kind, Pair, beside
from emloc_core.layers import FORMAT_VERSION, FOUR_BITS_VERSION, METHOD, replace_linears

#: Unit in which refinement moves the numbers of a factor: a share of their root mean square.
_UNIT = 0.3


class MovableFactors:
    """Two factors whose numbers may all move, in units of a share of the size that they have at first.

    Args:
        factors: U and V.
    """

    def __init__(self, factors: Factors) -> None:
        self._factors = factors
        self._units = [_UNIT * float(part.square().mean().sqrt()) for part in (factors.u, factors.v)]
        self.numbers = nn.Parameter(torch.zeros(factors.u.numel() + factors.v.numel(), device=factors.u.device))

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return U V with the numbers as they are now."""
        u, v = self._moved()
        return u.to(dtype) @ v.to(dtype)

    def settled(self) -> Factors:
        """Return U and V with the numbers as they are now."""
        u, v = self._moved()
        return replace(self._factors, u=u.detach(), v=v.detach())

    def _moved(self) -> Pair:
        parts = (self._factors.u, self._factors.v)
        moves = self.numbers.split([part.numel() for part in parts])
        u, v = (
            part.float() + unit * move.view_as(part) for part, unit, move in zip(parts, self._units, moves, strict=True)
        )
        return u, v


class LowRank(Kind):
    """Factors in the dtype of the base."""

    name = "low-rank"
    calibration, allocator = "propagated", "global"
    has_experts = True
    refine = 3

    def movable(self, stand_in: Factors) -> MovableFactors:
        """Let both factors move."""
        return MovableFactors(stand_in)

    def keys(self, weight: str) -> list[str]:
        """U replaces the weight, V is beside it."""
        return beside(weight, "V")

    def pack(self, weight: str, stand_in: Factors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return both factors."""
        parts = (stand_in.u.to("cpu", dtype), stand_in.v.to("cpu", dtype))
        return dict(zip(self.keys(weight), parts, strict=True))

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:  # noqa: ARG002
        """Return both factors."""
        u, v = tensors
        return u, v

    def config(self, ranks: dict[str, int], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:  # noqa: ARG002
        """Say which Linears are factors; :mod:`emloc_core.lowrank` loads them."""
        return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "ranks": ranks}

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:
        """``k (m + n)`` numbers."""
        return rank * sum(shape) * dtype.itemsize

    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Replace by the layers that an emulator has."""
        replace_linears(model, ranks)


class FourBitLowRank(Kind):
    """Factors in four bits, each fitted to the other as rounded, and seen as rounded by what is fitted after them."""

    name = "low-rank-nf4"
    calibration, allocator = "propagated", "global"
    taps_inputs = True
    samples = 256

    def rounding(self, factorize: Factorize) -> Fit:
        """Round both factors with feedback."""
        fit = in_four_bits(factorize)

        def measured(weights: Sequence[torch.Tensor], inputs: Gram, ranks: Sequence[int]) -> list[Factors]:
            matrix = feedback.single(inputs)
            return [
                replace(found, error=output_error(weight, found.u @ found.v, matrix))
                for weight, found in zip(weights, fit(weights, inputs, ranks), strict=True)
            ]

        return measured

    def told(self, rank: str) -> str:
        """The rank of the factors, and their bits."""
        return f"rank {rank} in four bits"

    def keys(self, weight: str) -> list[str]:
        """U replaces the weight."""
        return beside(weight, "V", "weight_scales", "V_scales")

    def pack(self, weight: str, stand_in: Factors, dtype: torch.dtype) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Return both factors' codes and scales."""
        (u, u_scales), (v, v_scales) = nf4.pack(stand_in.u), nf4.pack(stand_in.v)
        return dict(zip(self.keys(weight), (part.cpu() for part in (u, v, u_scales, v_scales)), strict=True))

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return both factors, unpacked; there are so many ranks as fit the scales of both."""
        u, v, u_scales, v_scales = tensors
        return nf4.unpack_factors(u, u_scales, v, v_scales, shape, dtype)

    def config(self, ranks: dict[str, int], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:  # noqa: ARG002
        """Say which Linears are factors; :mod:`emloc_core.lowrank` loads them."""
        return {"quant_method": METHOD, "format_version": FOUR_BITS_VERSION, "ranks": ranks}

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:  # noqa: ARG002
        """Half a byte a number, and a scale for every 64."""
        return nf4.factor_bytes(shape, rank)

    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Replace by the layers that an emulator has."""
        replace_linears(model, ranks, FOUR_BITS_VERSION)


def in_four_bits(factorize: Factorize, passes: int = feedback.PASSES) -> Fit:
    """Return what rounds U with feedback, fits V to that by least squares, and rounds it with feedback.

    The inputs of U are those of the exact V. The best V for a given U has ``U V x`` nearest to ``W x`` for every x:
    ``V = (U^T U)^-1 U^T W``. The Gram that it takes is that of the inputs. It measures no error.
    """

    def fit(weights: Sequence[torch.Tensor], inputs: Gram, ranks: Sequence[int]) -> list[Factors]:
        matrix = feedback.single(inputs)
        exact = [on_its_gram(factorize, *of, inputs) for of in zip(weights, ranks, strict=True)]
        us, vs = [], []
        for weight, of in zip(weights, exact, strict=True):
            inner = feedback.Damped(of.v.to(matrix) @ matrix @ of.v.to(matrix).T)
            u = feedback.rounded([of.u], inner, passes)[0].double()
            us.append(u.float())
            vs.append(torch.linalg.solve(u.T @ u, u.T @ weight.to(u)))
        vs = feedback.rounded(vs, feedback.damped(inputs), passes)
        return [replace(of, u=u, v=v) for of, u, v in zip(exact, us, vs, strict=True)]

    return fit


def on_its_gram(factorize: Factorize, weight: torch.Tensor, rank: int, inputs: Gram) -> Factors:
    """Factorise on the Gram that the factorizer asks for, or on the smaller one; there is that of the inputs."""
    on_inputs = wants_inputs(factorize) or cheaper_side(weight.shape[0], weight.shape[1]) == "input"
    return factorize(weight, inputs if on_inputs else inputs.through(weight), rank)
