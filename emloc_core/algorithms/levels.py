"""Rounding matrices to a few levels, with feedback.

The levels are those that normally distributed numbers are best rounded to (Max, 1960, "Quantizing for minimum
distortion"; Lloyd, 1982), times a scale that :data:`GROUP` neighbours in a row share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from emloc_core.algorithms.feedback import PASSES, Damped, descended, threads_for, with_feedback

#: The levels of a standard normal distribution, by how many there are.
LEVELS = {
    3: (-1.2240, 0.0, 1.2240),
    6: (-1.8936, -1.0001, -0.3177, 0.3177, 1.0001, 1.8936),
}
#: Numbers of a row that share a scale, which is in bf16.
GROUP = 256
#: How Grams are damped (``docs/decisions/0020-six-levels-have-more-damping.md``). Feedback moves errors to where rows
#: have next to no inputs. Tuning moves inputs there, and a LoRA uses the errors that it meets, which the base does not
#: have.
DAMPING = 0.1
#: Scales that are tried, times the root mean square of a group: rounding with the best of them loses least.
_SCALES = torch.linspace(0.5, 1.5, 21)
#: Numbers for which they are tried at a time: few enough to stay in a processor's cache.
_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 24}


@dataclass(frozen=True)
class Rounded:
    """A matrix on a few levels.

    Attributes:
        indices: of the levels, (m, n), int32.
        scales: (m, ceil(n / GROUP)), bf16.
        levels: how many.
    """

    indices: torch.Tensor
    scales: torch.Tensor
    levels: int

    def numbers(self) -> torch.Tensor:
        """Return the matrix, (m, n), in fp32."""
        values, _ = _levels(self.levels, self.scales.float())
        return at(values, self.indices) * _spread(self.scales.float(), self.indices.shape[1])

    def split(self, rows: Sequence[int]) -> "list[Rounded]":
        """Return the matrices that it is stacked of, by their numbers of rows."""
        parts = zip(self.indices.split(rows), self.scales.split(rows), strict=True)
        return [Rounded(indices, scales, self.levels) for indices, scales in parts]


def rounded(
    matrix: torch.Tensor, gram: Damped, levels: int, scales: torch.Tensor | None = None, passes: int = PASSES
) -> Rounded:
    """Round a matrix with feedback.

    Scales are first those that lose least without feedback, and between passes those that are best for the levels that
    were chosen.

    Args:
        matrix: M, (m, n), any floating dtype; perhaps several with the same inputs, stacked.
        gram: of its inputs.
        levels: how many; a key of :data:`LEVELS`.
        scales: to begin with, (m, ceil(n / GROUP)), bf16, where better ones than those are known.
        passes: of descent.
    """
    matrix = matrix.float()
    grid = _Grid(levels, _scales(matrix, levels) if scales is None else scales, matrix.shape[1])
    indices = grid.indices(with_feedback(matrix, gram, grid.nearest))
    for _ in range(passes):
        units = at(grid.values, indices)
        with gram.matrix() as whole:
            better = _fitted(matrix, units, whole, grid.scales)
        grid = _Grid(levels, better, matrix.shape[1])
        indices = grid.indices(descended(matrix, units * grid.spread, gram, grid.nearest))
    return Rounded(indices, grid.scales, levels)


class _Grid:
    """The levels that every number of a matrix may be rounded to: those times the scale of its group.

    Args:
        levels: how many.
        scales: of the groups, (m, groups), bf16.
        n: numbers of a row.
    """

    def __init__(self, levels: int, scales: torch.Tensor, n: int) -> None:
        self.scales, self.spread = scales, _spread(scales.float(), n)
        self.values, self._middles = _levels(levels, self.spread)
        self._group_scales = scales.float().T.contiguous().unbind()

    def indices(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the index of the level that is nearest to every number, (m, n)."""
        return _indices(numbers / self.spread, self._middles)

    def nearest(self, numbers: torch.Tensor, column: int) -> torch.Tensor:
        """Round numbers of a column, (m,)."""
        scale = self._group_scales[column // GROUP]
        return self.values.index_select(0, torch.bucketize(numbers / scale, self._middles)).mul_(scale)


def _indices(numbers: torch.Tensor, middles: torch.Tensor) -> torch.Tensor:
    """Return how many of the middles between levels are below every number, int32.

    For a whole matrix, this takes a fraction of the time of ``torch.bucketize``; for a column more.
    """
    found = torch.zeros_like(numbers, dtype=torch.int32)
    for middle in middles:
        found += numbers > middle
    return found


def at(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return ``values[indices]``, which takes several times as long on a CPU."""
    return values.index_select(0, indices.flatten()).view(*indices.shape, *values.shape[1:])


def _scales(matrix: torch.Tensor, levels: int) -> torch.Tensor:
    """Return the scale of every group of a row, (m, groups), bf16 and above 0, that loses least without feedback."""
    rows = max(1, _NUMBERS.get(matrix.device.type, _NUMBERS["cuda"]) // matrix.shape[1])
    with threads_for(rows):
        return torch.cat([_scales_of_rows(part, levels) for part in matrix.split(rows)])


def _scales_of_rows(matrix: torch.Tensor, levels: int) -> torch.Tensor:
    (m, n), tiny = matrix.shape, torch.finfo(torch.bfloat16).tiny
    values, middles = _levels(levels, matrix)
    padded = functional.pad(matrix, (0, -n % GROUP)).view(m, -1, GROUP)
    typical = (_by_group(matrix.square()) / _by_group(torch.ones(1, n).to(matrix))).sqrt()
    best, least = typical.bfloat16(), torch.full_like(typical, torch.inf)
    for share in _SCALES.tolist():
        scale = (share * typical).clamp(min=tiny).bfloat16()
        spread = scale.float()[..., None]
        lost = (at(values, _indices(padded / spread, middles)) * spread - padded).square()
        lost = (lost * (padded != 0)).sum(2)  # padding, and zeros, which no even number of levels has
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return best


def _fitted(matrix: torch.Tensor, units: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the scales, (m, groups), bf16, with which levels that are chosen lose least: least squares, row by row.

    A row that would need a scale that is not above 0 keeps its own.

    Args:
        matrix: M, (m, n), in fp32.
        units: the levels, (m, n), without their scales.
        gram: G, (n, n), positive definite.
        scales: as they are.
    """
    (m, n), groups = matrix.shape, scales.shape[1]
    descent = units * ((matrix - units * _spread(scales.float(), n)) @ gram)
    curvature = torch.empty(m, groups, groups).to(matrix)
    for group, start in enumerate(range(0, n, GROUP)):
        stop = min(start + GROUP, n)
        curvature[:, group] = _by_group(units[:, start:stop] @ gram[start:stop] * units)
    diagonal = curvature.diagonal(dim1=1, dim2=2)  # of a group whose levels are all 0, it is 0
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(matrix.dtype).tiny
    changed = (scales + torch.linalg.solve(curvature.double(), _by_group(descent).double())).bfloat16()
    usable = (changed > 0) & changed.isfinite()
    return torch.where(usable.all(1, keepdim=True), changed, scales)


def _by_group(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sum of every group of a row, (m, groups)."""
    return functional.pad(numbers, (0, -numbers.shape[1] % GROUP)).view(len(numbers), -1, GROUP).sum(2)


def _spread(scales: torch.Tensor, n: int) -> torch.Tensor:
    """Return the scale of every number, (m, n)."""
    return scales.repeat_interleave(GROUP, dim=1)[:, :n]


def _levels(levels: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the levels, and the middles between them, on the device of ``like`` and in its dtype."""
    values = torch.tensor(LEVELS[levels]).to(like)
    return values, (values[1:] + values[:-1]) / 2
