"""Factors in the dtype of the base, as in the paper: ``W`` becomes ``U V``."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from emloc_core.algorithms.factorize import Factors, factorize, wants_inputs
from emloc_core.algorithms.statistics import Gram, Side, cheaper_side
from emloc_core.compat.transformers import grouped_product
from emloc_core.standins import costs
from emloc_core.standins.costs import Planned
from emloc_core.standins.format import Format, Ratios
from emloc_core.standins.layer import Groups, PackedLinear, Parts, StandInLinear, product
from emloc_core.standins.standin import StandIn

#: Takes a weight, (m, n), a Gram of its inputs or outputs, and a rank.
Factorize = Callable[[torch.Tensor, Gram, int], Factors]


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
    def unpack(*parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return ``U V``."""
        u, v = parts
        return u @ v

    @classmethod
    def grouped(
        cls, x: torch.Tensor, groups: Groups, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply by one factor after the other."""
        u, v = parts
        return grouped_product(grouped_product(x, v, groups.ends), u, groups.ends)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return functional.linear(functional.linear(input, self.V), self.weight, self.bias)


class Factored(Format):
    """Two factors instead of a weight.

    Attributes:
        factorize: gives the factors of a weight; a plugin may bring its own.
    """

    allocator = "global"
    experts = True
    factorize: Factorize = staticmethod(factorize)

    def numbers(self, shape: tuple[int, int], rank: int | None) -> int:
        """``k (m + n)``."""
        return (rank or 0) * sum(shape)

    def reading_bytes(self, linears: Sequence[Planned], itemsize: int) -> int:
        """Factors as they are read."""
        return itemsize * self._factors(linears)

    def _factors(self, linears: Sequence[Planned]) -> int:
        return sum((linear.rank or 0) * (linear.out_features + linear.in_features) for linear in linears)


class LowRank(Factored):
    """Factors in the dtype of the base."""

    name = "low-rank"
    layer = LowRankLinear
    ratios = Ratios()

    def tap(self, cheaper: Side) -> Side:
        """Capture outputs where these are fewer, unless the factorizer needs inputs."""
        return "input" if wants_inputs(self.factorize) else cheaper

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[Factors]:
        """Factorise weights one by one."""
        return [in_single(self.factorize(weight, gram, rank or 0)) for weight, rank in zip(weights, ranks, strict=True)]

    def ranking(self) -> Format:
        """Return this format."""
        return self

    def pack(self, fitted: Factors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return both factors."""
        return {"weight": fitted.u.to("cpu", dtype), "V": fitted.v.to("cpu", dtype)}

    def read(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> StandIn:
        """Return both factors."""
        return StandIn(*tensors)

    def fitted_bytes(self, linears: Sequence[Planned], dtype: torch.dtype) -> int:
        """Factors in fp32."""
        return 4 * self._factors(linears)

    def fitting_bytes(self, linears: Sequence[Planned], *, propagated: bool, itemsize: int) -> int:
        """The peak of factorising."""
        return costs.factoring_bytes(linears, propagated=propagated)


def in_single(factors: Factors) -> Factors:
    """Return factors in fp32, whatever they were computed in."""
    return replace(factors, u=factors.u.float(), v=factors.v.float())


class RoundedLowRankLinear(PackedLinear):
    """``y = U (V x) + b``: ``weight`` is U and ``V`` is V, each packed, beside its scales."""

    V: nn.Parameter
    weight_scales: nn.Parameter
    V_scales: nn.Parameter

    @staticmethod
    def factor(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return one factor, of this shape and dtype."""
        raise NotImplementedError

    @classmethod
    def factors(
        cls, parts: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return U, (m, k), and V, (k, n), of a weight of this shape, from their codes and scales, which tell k."""
        raise NotImplementedError

    @classmethod
    def unpack(cls, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return ``U V``."""
        u, v = cls.factors(parts, shape, dtype)
        return u @ v

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        (m, n), k = self.shape, self.rank or 0
        inner = product(input, partial(self.factor, shape=(k, n), dtype=self.dtype), self.V, self.V_scales)
        output = product(inner, partial(self.factor, shape=(m, k), dtype=self.dtype), self.weight, self.weight_scales)
        return output if self.bias is None else output + self.bias


class RoundedLowRank(Factored):
    """Factors that are rounded with feedback, fitted to the inputs once more as rounded, and packed at once."""

    layer: type[RoundedLowRankLinear]
    samples = 256

    def exact(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[Factors]:
        """Factorise weights on the Gram that the factorizer asks for, or on the smaller one; ``gram`` is of inputs."""
        factors = []
        for weight, rank in zip(weights, ranks, strict=True):
            on_inputs = wants_inputs(self.factorize) or cheaper_side(weight.shape[0], weight.shape[1]) == "input"
            factors.append(self.factorize(weight, gram if on_inputs else gram.through(weight), rank or 0))
        return list(map(in_single, factors))

    def fitting_bytes(self, linears: Sequence[Planned], *, propagated: bool, itemsize: int) -> int:
        """The peak of factorising on the smaller Gram, and of rounding."""
        smaller = not wants_inputs(self.factorize)
        return costs.rounded_factoring_bytes(linears, propagated=propagated, smaller=smaller)

    def ranking(self) -> Format:
        """Return factors as they are."""
        format = LowRank()
        format.factorize = self.factorize
        return format

    def read(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> StandIn:
        """Return both factors, unpacked."""
        return StandIn(*self.layer.factors(tensors, shape, dtype))
