"""Rounding matrices to trellis codes, with feedback.

The numbers of a column are a row of bits, of which each sees the last :data:`STATE_BITS`: what a table has for these is
its value, times a scale that :data:`GROUP` neighbours in a row share. So a number has as many values as the table, for
the two or three bits that are new to it. Viterbi's algorithm (1967) finds the bits whose values are nearest to all
numbers of a column together. Of normally distributed numbers, the squared error is half of that of six levels, three of
which would take a byte too.

As in QTIP (Tseng et al., 2024, arXiv 2406.11235), where a row of bits is a tile of the matrix, within which feedback
compensates nothing. Here it is a column, whose numbers have nothing to compensate for each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from emloc_core.algorithms import native
from emloc_core.algorithms.feedback import Damped, descended, some_rows, with_feedback
from emloc_core.algorithms.native import SEGMENT, STATE_BITS, Codes
from emloc_core.algorithms.scales import GROUP, by_group, fitted_scales, lookup, spread

#: After how many bits of a byte each of the numbers that it holds ends.
ENDS = (2, 5, 8)
COUNT = len(ENDS)
_STATES = 1 << STATE_BITS
#: Passes of descent; a second one takes as long again, and lowers the error of the outputs by 3 %.
PASSES = 1
#: Knuth's, with which neighbouring states have values far apart.
_MULTIPLIER = 2654435761


@cache
def values() -> torch.Tensor:
    """Return the value of every state, (states,), fp32, on the CPU: quantiles of a normal distribution, mixed up.

    They are the same in bf16 and fp16.
    """
    order = torch.arange(_STATES, device="cpu")
    quantiles = torch.special.ndtri((order.double() + 0.5) / _STATES)[order * _MULTIPLIER % _STATES]
    return (quantiles / quantiles.square().mean().sqrt()).bfloat16().float()


@dataclass(frozen=True)
class Coded:
    """A matrix in a trellis code.

    Attributes:
        states: the bits that every number sees, (m, n), int16.
        scales: (m, ceil(n / GROUP)), bf16.
    """

    states: torch.Tensor
    scales: torch.Tensor

    def numbers(self) -> torch.Tensor:
        """Return the matrix, (m, n), in fp32."""
        numbers = lookup(values().to(self.scales.device), self.states)
        return numbers.mul_(spread(self.scales.float(), self.states.shape[1]))

    def codes(self) -> torch.Tensor:
        """Return the bytes of every column, (ceil(m / COUNT), n), uint8."""
        m = len(self.states)
        last = torch.arange(COUNT - 1, m + COUNT - 1, COUNT, device=self.states.device).clamp(max=m - 1)
        missing = 8 - torch.tensor(ENDS, device=last.device)[last % COUNT]
        return (self.states[last].int() << missing[:, None]).to(torch.uint8)


def rounded(matrix: torch.Tensor, gram: Damped, passes: int = PASSES) -> Coded:
    """Round a matrix with feedback; between passes, scales are fitted to the values.

    Args:
        matrix: M, (m, n), any floating dtype.
        passes: of descent.
    """
    parts = [_rounded(matrix[rows].float(), gram, passes) for rows in some_rows(matrix, SEGMENT)]
    states, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Coded(states, scales)


def _rounded(matrix: torch.Tensor, gram: Damped, passes: int) -> tuple[torch.Tensor, torch.Tensor]:
    code = _Code(_scales(matrix), matrix.shape)
    with_feedback(matrix, gram, code)
    if passes:
        with gram.matrix() as gram_matrix:
            image = gram_matrix @ matrix.T
    for _ in range(passes):
        numbers = code.units()
        with gram.matrix() as gram_matrix:
            better, descent = fitted_scales(image, numbers, gram_matrix, code.stored)
        code.rescale(better)
        descended(code.times_scales(numbers).T, descent.T, gram, code)
    return code.states.T.to(matrix.device), code.stored


def _scales(matrix: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of every group of a row, (m, groups), bf16 and above 0."""
    counts = by_group(torch.ones(matrix.shape[1], 1, device=matrix.device))
    typical = (by_group(matrix.T.square()) / counts).sqrt().T
    return typical.clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()


class _Code:
    """Rounds blocks of columns of a matrix, (m, n), on the CPU.

    Args:
        scales: of the groups, (m, groups), bf16.

    Attributes:
        states: those that were found last, (n, m), int16, on the CPU.
        stored: the scales in bf16.
    """

    def __init__(self, scales: torch.Tensor, shape: Sequence[int]) -> None:
        m, n = shape
        self.states = torch.empty(n, m, dtype=torch.int16, device="cpu")
        self.rescale(scales)

    def rescale(self, scales: torch.Tensor) -> None:
        """Take other scales."""
        self.stored = scales
        self._codes = Codes(scales.float().T.contiguous().cpu(), values(), self.states, GROUP)

    def round_block(
        self, block: torch.Tensor, changes: torch.Tensor, factor: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """See :class:`emloc_core.algorithms.feedback.RoundsBlocks`."""
        numbers, changed = block.cpu(), changes.cpu()
        native.round_block(numbers, changed, factor.cpu(), positions.cpu(), self._codes)
        block.copy_(numbers)
        changes.copy_(changed)

    def descend_block(
        self, block: torch.Tensor, slopes: torch.Tensor, changes: torch.Tensor, curvature: torch.Tensor, start: int
    ) -> None:
        """See :class:`emloc_core.algorithms.feedback.RoundsBlocks`."""
        numbers, changed = block.cpu(), changes.cpu()
        native.descend_block(numbers, slopes.cpu(), changed, curvature.cpu(), start, self._codes)
        block.copy_(numbers)
        changes.copy_(changed)

    def units(self) -> torch.Tensor:
        """Return the values of the states, (n, m), without their scales."""
        return lookup(values(), self.states).to(self.stored.device)

    def times_scales(self, units: torch.Tensor) -> torch.Tensor:
        """Multiply values, (n, m), by their scales, in their place."""
        return units.mul_(spread(self.stored.float(), len(units)).T)
