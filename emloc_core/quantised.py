"""Linears whose matrices are packed, in four bits or on a few levels, and unpacked in every pass."""

from collections.abc import Iterator

import torch
from torch import nn

from emloc_core.algorithms import levels, nf4

#: Name, shape and dtype of a parameter.
Part = tuple[str, tuple[int, ...], torch.dtype]


class PackedLinear(nn.Linear):
    """A Linear whose ``weight`` is packed, so that PEFT puts a LoRA on it as on any Linear, with the base's keys.

    Attributes:
        size: rank of the factors, or number of levels.
        dtype: that it computes in.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the weight
        self.in_features, self.out_features, self.size = in_features, out_features, size
        self.dtype = dtype or torch.get_default_dtype()
        for name, shape, kept in self.parts():
            part = torch.empty(*shape, dtype=kept, device=device)
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    def parts(self) -> Iterator[Part]:
        """Yield what is kept of the weight; none of it is trained."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the unpacked weight."""
        return self.out_features, self.in_features

    def unpacked(self) -> torch.Tensor:
        """Return the weight, (out_features, in_features)."""
        raise NotImplementedError

    def dense(self) -> nn.Linear:
        """Return the ordinary Linear with the unpacked weight."""
        weight = self.unpacked()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


class FourBitLowRankLinear(PackedLinear):
    """``y = U (V x) + b`` with both factors in four bits; see :mod:`emloc_core.algorithms.nf4`.

    As in :class:`emloc_core.layers.LowRankLinear`, ``weight`` is U and ``V`` is V, here packed, each beside its
    scales.
    """

    V: nn.Parameter
    weight_scales: nn.Parameter
    V_scales: nn.Parameter

    def parts(self) -> Iterator[Part]:
        """Yield codes and scales of both factors."""
        yield from _factor("weight", self.out_features, self.size)
        yield from _factor("V", self.size, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        inner = nf4.product(input, self.V, self.V_scales, (self.size, self.in_features), self.dtype)
        found = nf4.product(inner, self.weight, self.weight_scales, (self.out_features, self.size), self.dtype)
        return found if self.bias is None else found + self.bias

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, rank={self.size}, four bits"

    def unpacked(self) -> torch.Tensor:
        """Return ``U V``."""
        u, v = nf4.unpack_factors(self.weight, self.weight_scales, self.V, self.V_scales, self.shape, self.dtype)
        return u @ v


class FourBitLinear(PackedLinear):
    """``y = W x + b`` with W in four bits and its scales in eight, as bitsandbytes has them.

    ``weight`` is W, packed. ``weight_scales`` and ``weight_ranges`` are those of
    :func:`emloc_core.algorithms.nf4.unpack_scales`.
    """

    weight_scales: nn.Parameter
    weight_ranges: nn.Parameter

    def parts(self) -> Iterator[Part]:
        """Yield the packed weight."""
        nf4.scale_levels(torch.device("cpu"))  # there already where a pass is traced without contents
        codes, scales = nf4.sizes(*self.shape)
        yield "weight", (codes, 1), torch.uint8
        yield "weight_scales", (scales,), torch.uint8
        yield "weight_ranges", (nf4.ranges(scales),), torch.float32

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features), in the input's dtype."""
        found = nf4.product(input, self.weight, self._scales(), self.shape, self.dtype)
        return (found if self.bias is None else found + self.bias).to(input.dtype)

    def _scales(self) -> torch.Tensor:
        return nf4.unpack_scales(self.weight_scales, self.weight_ranges.float())

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, four bits"

    def unpacked(self) -> torch.Tensor:
        """Return W."""
        return nf4.unpack(self.weight, self._scales(), self.shape, self.dtype)


class FewLevelsLinear(PackedLinear):
    """``y = W x + b`` with the weight on a few levels; see :mod:`emloc_core.algorithms.levels`.

    ``weight`` is its codes, beside the scales.
    """

    weight_scales: nn.Parameter

    @property
    def levels(self) -> int:
        """How many the weight has."""
        return self.size

    def parts(self) -> Iterator[Part]:
        """Yield codes and scales."""
        levels.bytes_table(self.levels, self.dtype)  # there already where a pass is traced without contents
        codes, scales = levels.sizes(self.levels, *self.shape)
        yield "weight", (codes, 1), torch.uint8
        yield "weight_scales", (self.out_features, scales // self.out_features), torch.bfloat16

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        found = levels.product(input, self.weight, self.weight_scales, self.shape, self.levels, self.dtype)
        return found if self.bias is None else found + self.bias

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, {self.levels} levels"

    def unpacked(self) -> torch.Tensor:
        """Return the weight."""
        return levels.unpack(self.weight, self.weight_scales, self.shape, self.levels, self.dtype)


class RepairedLinear(FewLevelsLinear):
    """``y = W x + U (V x) + b``: W on three levels beside a low-rank repair of the rounding error, in four bits."""

    LEVELS = 3

    U: nn.Parameter
    V: nn.Parameter
    U_scales: nn.Parameter
    V_scales: nn.Parameter

    @property
    def levels(self) -> int:
        """How many the weight has; ``size`` is the rank of the repair."""
        return self.LEVELS

    def parts(self) -> Iterator[Part]:
        """Yield codes and scales, of the weight and of both factors of its repair."""
        yield from super().parts()
        yield from _factor("U", self.out_features, self.size)
        yield from _factor("V", self.size, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        inner = nf4.product(input, self.V, self.V_scales, (self.size, self.in_features), self.dtype)
        repair = nf4.product(inner, self.U, self.U_scales, (self.out_features, self.size), self.dtype)
        return super().forward(input) + repair

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()} and a repair, rank={self.size}, four bits"

    def unpacked(self) -> torch.Tensor:
        """Return ``W + U V``."""
        u, v = nf4.unpack_factors(self.U, self.U_scales, self.V, self.V_scales, self.shape, self.dtype)
        return torch.addmm(super().unpacked(), u, v)


def _factor(name: str, rows: int, columns: int) -> Iterator[Part]:
    """Yield codes and scales of a factor in four bits."""
    codes, scales = nf4.sizes(rows, columns)
    yield name, (codes, 1), torch.uint8
    yield f"{name}_scales", (scales,), torch.float32
