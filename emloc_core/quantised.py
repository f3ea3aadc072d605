"""Linears whose matrices are packed, in four bits or on a few levels, and unpacked in every pass."""

import torch
from torch import nn
from torch.nn import functional

from emloc_core.algorithms import fourbit, levels


class FourBitLowRankLinear(nn.Linear):
    """``y = U (V x) + b`` with both factors in four bits; see :mod:`emloc_core.algorithms.fourbit`.

    As in :class:`emloc_core.lowrank.LowRankLinear`, ``weight`` is U and ``V`` is V, here packed, each beside its
    scales.
    """

    V: nn.Parameter
    weight_scales: nn.Parameter
    V_scales: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.dtype = dtype or torch.get_default_dtype()
        for name, shape in (("weight", (out_features, rank)), ("V", (rank, in_features))):
            codes, scales = fourbit.sizes(*shape)
            packed = torch.empty(codes, 1, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(packed, requires_grad=False))
            factors = torch.empty(scales, dtype=torch.float32, device=device)
            self.register_parameter(f"{name}_scales", nn.Parameter(factors, requires_grad=False))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        inner = fourbit.product(input, self.V, self.V_scales, (self.rank, self.in_features), self.dtype)
        found = fourbit.product(inner, self.weight, self.weight_scales, (self.out_features, self.rank), self.dtype)
        return found if self.bias is None else found + self.bias

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, rank={self.rank}, four bits"

    def dense(self) -> nn.Linear:
        """Return the ordinary Linear with the weight ``U V``."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, self.weight.device, self.dtype)
        u = fourbit.unpack(self.weight, self.weight_scales, (self.out_features, self.rank), self.dtype)
        v = fourbit.unpack(self.V, self.V_scales, (self.rank, self.in_features), self.dtype)
        with torch.no_grad():
            linear.weight.copy_(u @ v)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


class RepairedLinear(nn.Linear):
    """``y = W x + U (V x) + b``: W in four bits, its scales in eight, beside a low-rank repair of what rounding lost.

    ``weight`` is W, packed, so that PEFT puts a LoRA on it as on any Linear, with the same keys as on the base.
    ``weight_scales`` and ``weight_ranges`` are those of :func:`emloc_core.algorithms.fourbit.pack_scales`; ``U``
    (out_features, rank) and ``V`` (rank, in_features) have the dtype of the base.
    """

    weight_scales: nn.Parameter
    weight_ranges: nn.Parameter
    U: nn.Parameter
    V: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        codes, scales = fourbit.sizes(out_features, in_features)
        fourbit.scale_levels(torch.device("cpu"))  # there already where a pass is traced without contents
        for name, shape, kept in (
            ("weight", (codes, 1), torch.uint8),
            ("weight_scales", (scales,), torch.uint8),
            ("weight_ranges", (fourbit.ranges(scales),), torch.float32),
            ("U", (out_features, rank), dtype),
            ("V", (rank, in_features), dtype),
        ):
            part = torch.empty(*shape, dtype=kept, device=device)
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        dtype = self.U.dtype  # also where the model was cast after loading
        found = fourbit.product(input, self.weight, self._scales(), (self.out_features, self.in_features), dtype)
        return found + functional.linear(functional.linear(input.to(dtype), self.V), self.U, self.bias)

    def _scales(self) -> torch.Tensor:
        return fourbit.unpack_scales(self.weight_scales, self.weight_ranges.float())

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, rank={self.rank}, four bits and a repair"

    def dense(self) -> nn.Linear:
        """Return the ordinary Linear with the weight ``W + U V``."""
        device, dtype = self.weight.device, self.U.dtype
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device, dtype)
        weight = fourbit.unpack(self.weight, self._scales(), (self.out_features, self.in_features), dtype)
        with torch.no_grad():
            linear.weight.copy_(torch.addmm(weight, self.U, self.V))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


class FewLevelsLinear(nn.Linear):
    """``y = W x + b`` with the weight on a few levels; see :mod:`emloc_core.algorithms.levels`.

    ``weight`` is its codes, beside the scales.
    """

    weight_scales: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        count: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.levels = in_features, out_features, count
        self.dtype = dtype or torch.get_default_dtype()
        codes, scales = levels.sizes(count, out_features, in_features)
        packed = torch.empty(codes, 1, dtype=torch.uint8, device=device)
        factors = torch.empty(out_features, scales // out_features, dtype=torch.bfloat16, device=device)
        self.weight, self.weight_scales = (nn.Parameter(part, requires_grad=False) for part in (packed, factors))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        shape = (self.out_features, self.in_features)
        found = levels.product(input, self.weight, self.weight_scales, shape, self.levels, self.dtype)
        return found if self.bias is None else found + self.bias

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, {self.levels} levels"

    def dense(self) -> nn.Linear:
        """Return the ordinary Linear with the weight, unpacked."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, self.weight.device, self.dtype)
        shape = (self.out_features, self.in_features)
        with torch.no_grad():
            linear.weight.copy_(levels.unpack(self.weight, self.weight_scales, shape, self.levels, self.dtype))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear
