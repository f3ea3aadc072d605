"""Rounding matrices to four levels, with feedback.

The levels are those that normally distributed numbers are best rounded to (Max, 1960, "Quantizing for minimum
distortion"; Lloyd, 1982), times a scale that :data:`GROUP` neighbours in a row share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from emloc_core.algorithms.feedback import PASSES, Damped, descended, some_rows, threads_for, with_feedback
from emloc_core.algorithms.grid import Grid, indices
from emloc_core.algorithms.scales import GROUP, fitted_scales, lookup, spread
from emloc_core.algorithms.statistics import blocks

#: Those of a standard normal distribution.
LEVELS = (-1.5104, -0.4528, 0.4528, 1.5104)
#: What the size of a number is above, by how much its level rises there, and by how much its square.
_STEPS = (
    (0.0, LEVELS[2], LEVELS[2] ** 2),
    ((LEVELS[2] + LEVELS[3]) / 2, LEVELS[3] - LEVELS[2], LEVELS[3] ** 2 - LEVELS[2] ** 2),
)
#: Scales that are tried, times the root mean square of a group.
_SCALES = torch.linspace(0.5, 1.5, 21)
#: Numbers for which they are tried at a time: few enough to stay in a processor's cache.
_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 24}


@dataclass(frozen=True)
class Rounded:
    """A matrix on four levels.

    Attributes:
        indices: of the levels, (m, n), uint8.
        scales: (m, ceil(n / GROUP)), bf16.
    """

    indices: torch.Tensor
    scales: torch.Tensor

    def numbers(self) -> torch.Tensor:
        """Return the matrix, (m, n), in fp32."""
        scales = self.scales.float()
        return lookup(torch.tensor(LEVELS).to(scales), self.indices).mul_(spread(scales, self.indices.shape[1]))

    def split(self, rows: Sequence[int]) -> "list[Rounded]":
        """Return the matrices that it is stacked of, by their numbers of rows."""
        parts = zip(self.indices.split(rows), self.scales.split(rows), strict=True)
        return [Rounded(indices, scales) for indices, scales in parts]


def rounded(matrix: torch.Tensor, gram: Damped, passes: int = PASSES) -> Rounded:
    """Round a matrix with feedback.

    Scales are at first the ones that lose least without feedback; between passes they are fitted to the chosen levels.

    Args:
        matrix: M, (m, n), any floating dtype; perhaps several with the same inputs, stacked.
        passes: of descent.
    """
    parts = [_rounded(matrix[rows].float(), gram, passes) for rows in some_rows(matrix)]
    return Rounded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _rounded(matrix: torch.Tensor, gram: Damped, passes: int) -> tuple[torch.Tensor, torch.Tensor]:
    grid = _Grid(_scales(matrix), matrix.shape[1])
    numbers = with_feedback(matrix, gram, grid)
    if passes:
        with gram.matrix() as gram_matrix:
            image = gram_matrix @ matrix.T
    for _ in range(passes):
        numbers = lookup(grid.levels, grid.indices(numbers.T))
        with gram.matrix() as gram_matrix:
            better, descent = fitted_scales(image, numbers, gram_matrix, grid.stored)
        del grid
        grid = _Grid(better, matrix.shape[1])
        numbers = descended(grid.numbers(numbers).T, descent.T, gram, grid)
    return grid.indices(numbers.T).T, grid.stored


class _Grid(Grid):
    """What numbers of a matrix may be rounded to: four levels, times the scale of their group.

    Args:
        scales: of the groups, (m, groups), bf16.
        n: numbers of a row.

    Attributes:
        stored: the scales in bf16.
    """

    def __init__(self, scales: torch.Tensor, n: int) -> None:
        by_group = scales.float().T.contiguous()
        super().__init__(torch.tensor(LEVELS).to(by_group), by_group, GROUP)
        self.stored = scales
        self._spread = by_group.repeat_interleave(GROUP, dim=0)[:n]

    def indices(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the index of the level that is nearest to every number, (n, m)."""
        return indices(numbers / self._spread, self.middles)

    def numbers(self, units: torch.Tensor) -> torch.Tensor:
        """Multiply levels, (n, m), by their scales, in their place."""
        return units.mul_(self._spread)


def _scales(matrix: torch.Tensor) -> torch.Tensor:
    """Return the scale of every group of a row, (m, groups), bf16 and above 0, that loses least without feedback."""
    rows = max(1, _NUMBERS.get(matrix.device.type, _NUMBERS["cuda"]) // matrix.shape[1])
    with threads_for(rows):
        return torch.cat([_scales_of_rows(part) for part in matrix.split(rows)])


def _scales_of_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return the scales of few rows, as :func:`_scales`.

    Levels are symmetric, so what a number is rounded to is a sum of steps, one for every middle that its size is above;
    and what is lost follows, but for what no scale changes, from how many are above, and their sum.
    """
    (m, n), tiny = matrix.shape, torch.finfo(torch.bfloat16).tiny
    sizes = functional.pad(matrix.abs(), (0, -n % GROUP)).view(m, -1, GROUP)
    counts = torch.tensor([part.stop - part.start for part in blocks(n, GROUP)]).to(matrix)
    typical = (sizes.square().sum(2) / counts).sqrt()
    best, least = typical.bfloat16(), torch.full_like(typical, torch.inf)
    above = torch.empty_like(sizes)
    for share in _SCALES.tolist():
        scale = (share * typical).clamp(min=tiny).bfloat16()
        spread = scale.float()
        slope, curvature = torch.zeros_like(spread), torch.zeros_like(spread)
        for middle, step, square in _STEPS:
            torch.gt(sizes, (middle * spread)[..., None], out=above)
            curvature.add_(above.sum(2), alpha=square)
            slope.add_(above.mul_(sizes).sum(2), alpha=step)
        lost = spread * (spread * curvature - 2 * slope)
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return best
