"""Linears whose matrices are packed, in four bits or on a few levels, and unpacked in every pass."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from emloc_core.algorithms import fourbit, levels

#: Name, shape and dtype of a parameter.
Part = tuple[str, tuple[int, ...], torch.dtype | None]


class PackedLinear(nn.Linear):
    """A Linear whose ``weight`` is packed, so that PEFT puts a LoRA on it as on any Linear, with the base's keys.

    Attributes:
        dtype: that it computes in.
    """

    def _build(
        self,
        in_features: int,
        out_features: int,
        parts: Iterable[Part],
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register the parts, which are not trained, and the bias; in place of ``nn.Linear.__init__``."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        for name, shape, kept in parts:
            part = torch.empty(*shape, dtype=kept, device=device)
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

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
        parts: list[Part] = []
        for name, shape in (("weight", (out_features, rank)), ("V", (rank, in_features))):
            codes, scales = fourbit.sizes(*shape)
            parts += [(name, (codes, 1), torch.uint8), (f"{name}_scales", (scales,), torch.float32)]
        self._build(in_features, out_features, parts, bias, device, dtype)
        self.rank = rank

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        inner = fourbit.product(input, self.V, self.V_scales, (self.rank, self.in_features), self.dtype)
        found = fourbit.product(inner, self.weight, self.weight_scales, (self.out_features, self.rank), self.dtype)
        return found if self.bias is None else found + self.bias

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, rank={self.rank}, four bits"

    def unpacked(self) -> torch.Tensor:
        """Return ``U V``."""
        u = fourbit.unpack(self.weight, self.weight_scales, (self.out_features, self.rank), self.dtype)
        return u @ fourbit.unpack(self.V, self.V_scales, (self.rank, self.in_features), self.dtype)


class RepairedLinear(PackedLinear):
    """``y = W x + U (V x) + b``: W in four bits, its scales in eight, beside a low-rank repair of what rounding lost.

    ``weight`` is W, packed. ``weight_scales`` and ``weight_ranges`` are those of
    :func:`emloc_core.algorithms.fourbit.pack_scales`; ``U`` (out_features, rank) and ``V`` (rank, in_features) have the
    dtype of the base.
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
        codes, scales = fourbit.sizes(out_features, in_features)
        fourbit.scale_levels(torch.device("cpu"))  # there already where a pass is traced without contents
        parts: list[Part] = [
            ("weight", (codes, 1), torch.uint8),
            ("weight_scales", (scales,), torch.uint8),
            ("weight_ranges", (fourbit.ranges(scales),), torch.float32),
            ("U", (out_features, rank), dtype),
            ("V", (rank, in_features), dtype),
        ]
        self._build(in_features, out_features, parts, bias, device, dtype)
        self.rank = rank

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        dtype = self.U.dtype  # also where the model was cast after loading
        found = fourbit.product(input, self.weight, self._scales(), self.shape, dtype)
        return found + functional.linear(functional.linear(input.to(dtype), self.V), self.U, self.bias)

    def _scales(self) -> torch.Tensor:
        return fourbit.unpack_scales(self.weight_scales, self.weight_ranges.float())

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, rank={self.rank}, four bits and a repair"

    def unpacked(self) -> torch.Tensor:
        """Return ``W + U V``."""
        weight = fourbit.unpack(self.weight, self._scales(), self.shape, self.U.dtype)
        return torch.addmm(weight, self.U, self.V)


class FewLevelsLinear(PackedLinear):
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
        codes, scales = levels.sizes(count, out_features, in_features)
        parts: list[Part] = [
            ("weight", (codes, 1), torch.uint8),
            ("weight_scales", (out_features, scales // out_features), torch.bfloat16),
        ]
        self._build(in_features, out_features, parts, bias, device, dtype)
        self.levels = count

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
