"""Weights on a few levels: fewer than four bits a number.

Codes are the digits of a byte: three of six levels (2.7 bits), four of four (2), five of three (1.6). :data:`GROUP`
neighbours in a row share a scale.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional

from emloc_core.algorithms import feedback, levels, native
from emloc_core.algorithms.factorize import output_error
from emloc_core.algorithms.levels import GROUP, LEVELS, spread
from emloc_core.algorithms.statistics import Gram
from emloc_core.compat.imports import when_imported
from emloc_core.standins import costs
from emloc_core.standins.costs import Planned
from emloc_core.standins.format import Format
from emloc_core.standins.layer import PackedLinear, Parts
from emloc_core.standins.standin import Packed


class FewLevelsLinear(PackedLinear):
    """``y = W x + b`` with the weight on a few levels: ``weight`` is its codes, beside the scales.

    Attributes:
        LEVELS: how many; a key of :data:`emloc_core.algorithms.levels.LEVELS`.
    """

    LEVELS: int

    weight_scales: nn.Parameter

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return codes and scales."""
        return parts("weight", shape, cls.LEVELS, dtype)

    @classmethod
    def unpack(cls, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return the weight."""
        codes, scales = parts
        return unpack(codes, scales, dtype, shape, cls.LEVELS)

    unpack_stack = unpack  # all at once

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, {self.LEVELS} levels"


class SixLevelsLinear(FewLevelsLinear):
    """The layer of the kind 2.7-bit."""

    LEVELS = 6


class MovableScales:
    """A weight whose scales may still move, by their logarithms.

    Args:
        layer: unpacks it.
    """

    def __init__(self, packed: Packed, layer: type[PackedLinear]) -> None:
        self._packed, self._layer = packed, layer
        self.numbers = nn.Parameter(packed.parts["weight_scales"].float().log())

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight with the scales as they are now."""
        codes, shape, scales = self._packed.parts["weight"], self._packed.shape, self.numbers.exp().bfloat16()
        ones = torch.ones_like(scales, requires_grad=False)  # what unpacks in one pass gives scales no gradient
        return self._layer.unpack(codes, ones, shape=shape, dtype=dtype) * spread(scales.to(dtype), shape[1])

    def settled(self) -> Packed:
        """Return it packed."""
        scales = self.numbers.detach().exp().bfloat16()
        return replace(self._packed, parts={**self._packed.parts, "weight_scales": scales})


class SixLevels(Format):
    """Weights on six levels, rounded with feedback, and seen as rounded by what is fitted after them: 2.7 bits each."""

    name = "2.7-bit"
    layer = SixLevelsLinear
    samples = 256
    refine = 3
    experts = True
    narrow = True

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[Packed]:
        """Round weights with feedback."""
        damped = feedback.damped(gram, levels.DAMPING)
        rounded = levels.rounded(feedback.stacked(weights), damped, self.layer.LEVELS)
        matrix, fitted = feedback.single(gram), []
        for weight, part in zip(weights, rounded.split([len(weight) for weight in weights]), strict=True):
            error = output_error(weight, part.numbers(), matrix)
            fitted.append(Packed(pack(part), (weight.shape[0], weight.shape[1]), error))
        return fitted

    def movable(self, fitted: Packed) -> MovableScales:
        """Let the scales move."""
        return MovableScales(fitted, self.layer)

    def fitting_bytes(self, linears: Sequence[Planned], *, propagated: bool, itemsize: int) -> int:
        """The peak of rounding, with scales that are fitted."""
        return costs.rounding_bytes(linears, scales=True)

    def describe(self, rank: str) -> str:
        """The number of levels."""
        return f"{self.layer.LEVELS} levels"


def parts(name: str, shape: tuple[int, int], count: int, dtype: torch.dtype) -> Parts:
    """Return what a layer keeps of a matrix of this name and shape on so many levels, to be unpacked to a dtype."""
    bytes_table(count, dtype)  # there already where a pass is traced without contents
    m, n = shape
    return {
        name: ((-(-m * n // digits(count)), 1), torch.uint8),
        f"{name}_scales": ((m, -(-n // GROUP)), torch.bfloat16),
    }


def pack(rounded: levels.Rounded, name: str = "weight") -> dict[str, torch.Tensor]:
    """Return codes, (bytes, 1), uint8, and the scales, (m, ceil(n / GROUP)), bf16, by their names in the layer."""
    count = digits(rounded.levels)
    flat = rounded.indices.flatten()
    flat = functional.pad(flat, (0, -len(flat) % count)).view(-1, count)
    weights = rounded.levels ** torch.arange(count, dtype=torch.uint8, device=flat.device)
    codes = (flat * weights).sum(1, dtype=torch.uint8)[:, None]
    return {name: codes, f"{name}_scales": rounded.scales}


def unpack(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int], count: int
) -> torch.Tensor:
    """Return the matrix of this shape and dtype, on so many levels, that :func:`pack` packed; or a stack of them."""
    if is_compiled(codes, scales, dtype):
        return unpack_levels(codes.contiguous(), scales.contiguous(), dtype, *shape, count)
    return _by_torch(codes, scales, dtype, shape, count)


def is_compiled(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether one pass does it all; so it is planned too, by tensors without contents."""
    known = scales.dtype == torch.bfloat16 and dtype in (torch.float32, torch.bfloat16)
    return (codes.is_cuda or known) and compiles_for(codes.device.type)


def compiles_for(device: str) -> bool:
    """Return whether what unpacks in one pass can be compiled for a type of device; a constant in torch's graphs."""
    if device == "cuda":
        return feedback.compiles_kernels()
    return device == "cpu" and native.compiler() is not None


# They look for a compiler, which torch cannot trace.
when_imported("torch._dynamo", partial(torch.compiler.assume_constant_result, compiles_for))


@torch.library.custom_op("emloc::unpack_levels", mutates_args=())
def unpack_levels(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int, count: int
) -> torch.Tensor:
    """Do what :func:`unpack` does in one pass, of contiguous tensors."""
    if codes.is_cuda:
        from emloc_core.standins import kernels

        return kernels.unpack_levels(codes, scales, dtype, m, n, count, digits(count))
    if native.library(native.UNPACKING):
        return native.unpack_levels(codes, scales, _widened_table(count, dtype), n, GROUP, dtype)
    return _by_torch(codes, scales, dtype, (m, n), count)


@unpack_levels.register_fake
def _(codes: torch.Tensor, _scales: torch.Tensor, dtype: torch.dtype, m: int, n: int, _count: int) -> torch.Tensor:
    return codes.new_empty(*codes.shape[:-2], m, n, dtype=dtype)


def _by_torch(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int], count: int
) -> torch.Tensor:
    m, n = shape
    table = bytes_table(count, dtype).to(codes.device, non_blocking=True)
    numbers = levels.lookup(table, codes.flatten()).view(*codes.shape[:-2], -1)
    matrix = numbers[..., : m * n].unflatten(-1, (m, n))
    groups, scales = n // GROUP, scales.to(dtype)
    matrix[..., : groups * GROUP].unflatten(-1, (groups, GROUP)).mul_(scales[..., :groups, None])
    matrix[..., groups * GROUP :].mul_(scales[..., groups:])  # the rest of a row
    return matrix


def digits(count: int) -> int:
    """Return how many codes of so many levels a byte holds."""
    return max(digits for digits in range(1, 9) if count**digits <= 256)


@cache
def bytes_table(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the levels that every byte stands for, (256, digits), on the CPU."""
    values = torch.tensor(LEVELS[count], dtype=dtype, device="cpu")
    powers = count ** torch.arange(digits(count), device="cpu")
    return values[torch.arange(256, device="cpu")[:, None] // powers % count]


@cache
def _widened_table(count: int, dtype: torch.dtype) -> torch.Tensor:
    return bytes_table(count, dtype).float()
