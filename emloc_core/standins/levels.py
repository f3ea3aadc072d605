"""Weights on a few levels: fewer than four bits a number.

Codes are the digits of a byte: three of six levels (2.7 bits), five of three (1.6). :data:`GROUP` neighbours in a row
share a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import torch
from torch import nn
from torch.nn import functional

from emloc_core.algorithms import feedback, levels
from emloc_core.algorithms.factorize import Factors, output_error
from emloc_core.algorithms.levels import GROUP, LEVELS
from emloc_core.algorithms.statistics import Gram
from emloc_core.standins.format import Factorize, Fit, Format, Pair, whole
from emloc_core.standins.layer import PackedLinear, Parts


class FewLevelsLinear(PackedLinear):
    """``y = W x + b`` with the weight on a few levels: ``weight`` is its codes, beside the scales.

    Attributes:
        LEVELS: how many; a key of :data:`emloc_core.algorithms.levels.LEVELS`.
    """

    LEVELS: int

    weight_scales: nn.Parameter

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:  # noqa: ARG003
        """Return codes and scales."""
        bytes_table(cls.LEVELS, dtype)  # there already where a pass is traced without contents
        m, n = shape
        return {
            "weight": ((-(-m * n // digits(cls.LEVELS)), 1), torch.uint8),
            "weight_scales": ((m, -(-n // GROUP)), torch.bfloat16),
        }

    @classmethod
    def unpack(cls, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return the weight."""
        codes, scales = parts
        return unpack(codes, scales, shape, cls.LEVELS, dtype)

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, {self.LEVELS} levels"


class SixLevelsLinear(FewLevelsLinear):
    """The layer of the kind 2.7-bit."""

    LEVELS = 6


@dataclass(frozen=True)
class PackedWeight(Factors):
    """A weight on a few levels: as U or V, beside the identity, and packed.

    Attributes:
        codes, scales: see :func:`pack`.
        count: number of levels.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    count: int

    def weight(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what the Linear multiplies by, (m, n), with these scales in place of its own."""
        return unpack(self.codes, scales, (self.u.shape[0], self.v.shape[1]), self.count, dtype)

    def with_scales(self, scales: torch.Tensor) -> Self:
        """Return it with these scales in place of its own."""
        u, v = whole(self.weight(scales, torch.float32))
        return replace(self, u=u, v=v, scales=scales)


class MovableScales:
    """A weight on a few levels whose scales may still move, by their logarithms.

    Args:
        packed: the weight.
    """

    def __init__(self, packed: PackedWeight) -> None:
        self._packed = packed
        self.numbers = nn.Parameter(packed.scales.float().log())

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight with the scales as they are now."""
        return self._packed.weight(self.numbers.exp().bfloat16(), dtype)

    def settled(self) -> PackedWeight:
        """Return it packed."""
        return self._packed.with_scales(self.numbers.detach().exp().bfloat16())


class SixLevels(Format):
    """Weights on six levels, rounded with feedback, and seen as rounded by what is fitted after them: 2.7 bits each."""

    name = "2.7-bit"
    layer = SixLevelsLinear
    has_factors = False
    keeps_weight = True
    calibration = "propagated"
    taps_inputs = True
    samples = 256
    refine = 3

    def rounding(self, factorize: Factorize) -> Fit:  # noqa: ARG002
        """Return what rounds weights with feedback, whatever their rank."""

        def fit(weights: Sequence[torch.Tensor], inputs: Gram, ranks: Sequence[int]) -> list[PackedWeight]:  # noqa: ARG001
            gram = feedback.damped(inputs, levels.DAMPING)
            found = levels.rounded(torch.cat(list(weights)), gram, self.layer.LEVELS)
            matrix, made = feedback.single(inputs), []
            for weight, part in zip(weights, found.split([len(weight) for weight in weights]), strict=True):
                numbers = part.numbers()
                nothing = torch.zeros(min(numbers.shape), dtype=torch.float64)
                error = output_error(weight, numbers, matrix)
                made.append(PackedWeight(*whole(numbers), nothing, *pack(part), part.levels, error=error))
            return made

        return fit

    def movable(self, stand_in: PackedWeight) -> MovableScales:
        """Let the scales move."""
        return MovableScales(stand_in)

    def told(self, rank: str) -> str:  # noqa: ARG002
        """The number of levels, whatever the rank."""
        return f"{self.layer.LEVELS} levels"

    def pack(self, stand_in: PackedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Return the codes and scales."""
        return {"weight": stand_in.codes.cpu(), "weight_scales": stand_in.scales.cpu()}

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return the weight and the identity."""
        return whole(self.layer.unpack(*tensors, shape=shape, dtype=dtype))


def pack(found: levels.Rounded) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, (bytes, 1), uint8, and the scales, (m, ceil(n / GROUP)), bf16."""
    count = digits(found.levels)
    flat = found.indices.flatten().int()
    flat = functional.pad(flat, (0, -len(flat) % count)).view(-1, count)
    weights = found.levels ** torch.arange(count, dtype=torch.int32, device=flat.device)
    return (flat * weights).sum(1, dtype=torch.int32).to(torch.uint8)[:, None], found.scales


def unpack(
    codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], count: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the matrix of this shape and dtype, on so many levels, that :func:`pack` packed."""
    m, n = shape
    table = bytes_table(count, dtype).to(codes.device, non_blocking=True)
    matrix = levels.at(table, codes.flatten().int()).flatten()[: m * n].view(m, n)
    groups, scales = n // GROUP, scales.to(dtype)
    matrix[:, : groups * GROUP].unflatten(1, (groups, GROUP)).mul_(scales[:, :groups, None])
    matrix[:, groups * GROUP :].mul_(scales[:, groups:])  # the rest of a row
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
