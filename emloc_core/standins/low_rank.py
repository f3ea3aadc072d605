"""Factors in the dtype of the base, as in the paper: ``W`` becomes ``U V``."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from emloc_core.algorithms.factorize import Factors
from emloc_core.standins.experts import LowRankExperts, is_stack
from emloc_core.standins.format import Factorize, Fit, Format, Pair, each
from emloc_core.standins.layer import Parts, StandInLinear

#: Unit in which refinement moves the numbers of a factor: a share of their root mean square.
_UNIT = 0.3


class LowRankLinear(StandInLinear):
    """``y = U (V x) + b``: ``weight`` *is* U (out_features, rank), beside ``V`` (rank, in_features)."""

    V: nn.Parameter
    trainable = True

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return both factors."""
        (m, n), k = shape, rank or 0
        return {"weight": ((m, k), dtype), "V": ((k, n), dtype)}

    @staticmethod
    def unpack(*parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:  # noqa: ARG004
        """Return ``U V``."""
        u, v = parts
        return u @ v

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return functional.linear(functional.linear(input, self.V), self.weight, self.bias)


class LowRank(Format):
    """Factors in the dtype of the base."""

    name = "low-rank"
    layer = LowRankLinear
    calibration, allocator = "propagated", "global"
    has_experts = True
    refine = 3

    def rounding(self, factorize: Factorize) -> Fit:
        """Return what factorises weights one by one."""
        return each(factorize)

    def movable(self, stand_in: Factors) -> "MovableFactors":
        """Let both factors move."""
        return MovableFactors(stand_in)

    def pack(self, stand_in: Factors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return both factors."""
        return {"weight": stand_in.u.to("cpu", dtype), "V": stand_in.v.to("cpu", dtype)}

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:  # noqa: ARG002
        """Return both factors."""
        u, v = tensors
        return u, v

    def replace(self, model: nn.Module, ranks: Mapping[str, int | None]) -> None:
        """Replace Linears, and stacks of experts."""
        linears, experts = dict(ranks), defaultdict[str, dict[str, int]](dict)
        for path in [path for path in ranks if is_stack(model, path)]:
            owner, _, name = path.rpartition(".")
            experts[owner][name] = linears.pop(path) or 0
        super().replace(model, linears)
        for path, of in experts.items():
            model.set_submodule(path, LowRankExperts(model.get_submodule(path), of))


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

    def _moved(self) -> tuple[torch.Tensor, torch.Tensor]:
        parts = (self._factors.u, self._factors.v)
        moves = self.numbers.split([part.numel() for part in parts])
        u, v = (
            part.float() + unit * move.view_as(part) for part, unit, move in zip(parts, self._units, moves, strict=True)
        )
        return u, v
