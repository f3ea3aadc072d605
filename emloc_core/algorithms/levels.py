"""Rounding matrices to a few levels, with feedback.

The levels are those that normally distributed numbers are best rounded to (Max, 1960, "Quantizing for minimum
distortion"; Lloyd, 1982), times a scale that :data:`GROUP` neighbours in a row share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from emloc_core.algorithms.feedback import PASSES, Damped, descended, some_rows, threads_for, with_feedback
from emloc_core.algorithms.grid import Grid, indices
from emloc_core.algorithms.statistics import blocks

#: The levels of a standard normal distribution, by how many there are.
LEVELS = {
    3: (-1.2240, 0.0, 1.2240),
    4: (-1.5104, -0.4528, 0.4528, 1.5104),
    6: (-1.8936, -1.0001, -0.3177, 0.3177, 1.0001, 1.8936),
}
#: Numbers of a row that share a scale, which is in bf16.
GROUP = 256
#: How Grams are damped (``docs/decisions/0020-six-levels-have-more-damping.md``). Feedback moves errors to where rows
#: have next to no inputs. Tuning moves inputs there, and a LoRA uses the errors that it meets, which the base does not
#: have.
DAMPING = 0.1
#: Scales that are tried, times the root mean square of a group.
_SCALES = torch.linspace(0.5, 1.5, 21)
#: Numbers for which they are tried at a time: few enough to stay in a processor's cache.
_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 24}
#: Numbers of the products of Gram and levels that are held while scales are fitted, of so many rows at least.
_PRODUCTS, _FEWEST = {"cpu": 1 << 22, "cuda": 1 << 25}, 64


@dataclass(frozen=True)
class Rounded:
    """A matrix on a few levels.

    Attributes:
        indices: of the levels, (m, n), uint8.
        scales: (m, ceil(n / GROUP)), bf16.
        levels: how many.
    """

    indices: torch.Tensor
    scales: torch.Tensor
    levels: int

    def numbers(self) -> torch.Tensor:
        """Return the matrix, (m, n), in fp32."""
        scales = self.scales.float()
        numbers = lookup(torch.tensor(LEVELS[self.levels]).to(scales), self.indices)
        return numbers.mul_(spread(scales, self.indices.shape[1]))

    def split(self, rows: Sequence[int]) -> "list[Rounded]":
        """Return the matrices that it is stacked of, by their numbers of rows."""
        parts = zip(self.indices.split(rows), self.scales.split(rows), strict=True)
        return [Rounded(indices, scales, self.levels) for indices, scales in parts]


def rounded(
    matrix: torch.Tensor, gram: Damped, levels: int, scales: torch.Tensor | None = None, passes: int = PASSES
) -> Rounded:
    """Round a matrix with feedback.

    Scales are at first the ones that lose least without feedback; between passes they are fitted to the chosen levels.

    Args:
        matrix: M, (m, n), any floating dtype; perhaps several with the same inputs, stacked.
        levels: how many; a key of :data:`LEVELS`.
        scales: initial ones, (m, ceil(n / GROUP)), bf16, if better ones are known.
        passes: of descent.
    """
    indices = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    best = torch.empty(len(matrix), -(-matrix.shape[1] // GROUP), dtype=torch.bfloat16, device=matrix.device)
    for rows in some_rows(matrix):
        initial = None if scales is None else scales[rows]
        indices[rows], best[rows] = _rounded(matrix[rows].float(), gram, levels, initial, passes)
    return Rounded(indices, best, levels)


def _rounded(
    matrix: torch.Tensor, gram: Damped, levels: int, scales: torch.Tensor | None, passes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    grid = _Grid(levels, _scales(matrix, levels) if scales is None else scales, matrix.shape[1])
    numbers = with_feedback(matrix, gram, grid)
    if passes:
        with gram.matrix() as gram_matrix:
            image = gram_matrix @ matrix.T
    for _ in range(passes):
        numbers = grid.units(numbers.T)
        with gram.matrix() as gram_matrix:
            better, descent = fitted_scales(image, numbers, gram_matrix, grid.stored)
        del grid
        grid = _Grid(levels, better, matrix.shape[1])
        numbers = descended(grid.numbers(numbers).T, descent.T, gram, grid)
    return grid.indices(numbers.T).T, grid.stored


class _Grid(Grid):
    """What numbers of a matrix may be rounded to: a few levels, times the scale of their group.

    Args:
        levels: how many.
        scales: of the groups, (m, groups), bf16.
        n: numbers of a row.

    Attributes:
        stored: the scales in bf16.
    """

    def __init__(self, levels: int, scales: torch.Tensor, n: int) -> None:
        by_group = scales.float().T.contiguous()
        super().__init__(torch.tensor(LEVELS[levels]).to(by_group), by_group, GROUP)
        self.stored = scales
        self._spread = by_group.repeat_interleave(GROUP, dim=0)[:n]
        #: Of three levels, 0 is between two that are this far away: to round is then quicker than to search.
        self._step = float(self.levels[-1]) if levels == 3 else None

    def units(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the level that is nearest to every number, (n, m), without its scale."""
        if self._step:
            return (numbers / self._spread).div_(self._step).round_().clamp_(-1, 1).mul_(self._step)
        return lookup(self.levels, self.indices(numbers))

    def indices(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the index of the level that is nearest to every number, (n, m)."""
        return indices(numbers / self._spread, self.middles)

    def numbers(self, units: torch.Tensor) -> torch.Tensor:
        """Multiply levels, (n, m), by their scales, in their place."""
        return units.mul_(self._spread)


def lookup(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return ``values[indices]``, several times as fast on a CPU."""
    return values.index_select(0, indices.flatten().int()).view(*indices.shape, *values.shape[1:])


def _scales(matrix: torch.Tensor, levels: int) -> torch.Tensor:
    """Return the scale of every group of a row, (m, groups), bf16 and above 0, that loses least without feedback."""
    rows = max(1, _NUMBERS.get(matrix.device.type, _NUMBERS["cuda"]) // matrix.shape[1])
    with threads_for(rows):
        return torch.cat([_scales_of_rows(part, levels) for part in matrix.split(rows)])


def _scales_of_rows(matrix: torch.Tensor, levels: int) -> torch.Tensor:
    """Return the scales of few rows, as :func:`_scales`.

    Levels are symmetric, so what a number is rounded to is a sum of steps, one for every middle that its size is above;
    and what is lost follows, but for what no scale changes, from how many are above, and their sum.
    """
    (m, n), tiny = matrix.shape, torch.finfo(torch.bfloat16).tiny
    sizes = functional.pad(matrix.abs(), (0, -n % GROUP)).view(m, -1, GROUP)
    counts = torch.tensor([part.stop - part.start for part in blocks(n, GROUP)]).to(matrix)
    typical = (sizes.square().sum(2) / counts).sqrt()
    best, least = typical.bfloat16(), torch.full_like(typical, torch.inf)
    steps, above = _steps(levels), torch.empty_like(sizes)
    for share in _SCALES.tolist():
        scale = (share * typical).clamp(min=tiny).bfloat16()
        spread = scale.float()
        slope, curvature = torch.zeros_like(spread), torch.zeros_like(spread)
        for middle, step, square in steps:
            torch.gt(sizes, (middle * spread)[..., None], out=above)
            curvature.add_(above.sum(2), alpha=square)
            slope.add_(above.mul_(sizes).sum(2), alpha=step)
        lost = spread * (spread * curvature - 2 * slope)
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return best


def _steps(levels: int) -> list[tuple[float, float, float]]:
    """Return, for every level above 0, the middle below it, and its distance from the one before, squared and not."""
    upper = [level for level in LEVELS[levels] if level > 0]
    lower = [-upper[0] if levels % 2 == 0 else 0.0, *upper[:-1]]
    return [
        ((high + low) / 2, high - max(low, 0.0), high**2 - max(low, 0.0) ** 2)
        for low, high in zip(lower, upper, strict=True)
    ]


def fitted_scales(
    image: torch.Tensor, units: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit scales to the chosen levels by least squares, row by row.

    A row that would need a scale of 0 or less keeps its own.

    Args:
        image: ``G M^T``, (n, m), in fp32.
        units: the levels, (n, m), without their scales.
        gram: G, (n, n), positive definite.
        scales: as they are, (m, groups), bf16.

    Returns:
        The scales, (m, groups), bf16; and ``G (M - Q)^T``, (n, m), for the levels with these.
    """
    (n, m), device = units.shape, gram.device.type
    fitted, descent = torch.empty_like(scales), torch.empty_like(image)
    most = rows_at_once(n, _PRODUCTS.get(device, _PRODUCTS["cuda"]))
    for rows in (slice(start, start + most) for start in range(0, m, most)):
        part_units, old = units[:, rows].contiguous(), scales[rows].double()
        products = [gram[:, part] @ part_units[part] for part in blocks(n, GROUP)]
        curvature = torch.stack([by_group(product * part_units) for product in products]).permute(2, 0, 1).double()
        slope = by_group(part_units * image[:, rows]).T.double() - (curvature @ old[..., None])[..., 0]
        diagonal = curvature.diagonal(dim1=1, dim2=2)  # of a group whose levels are all 0, it is 0
        diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(image.dtype).tiny
        changed = (old + torch.linalg.solve(curvature, slope)).to(scales.dtype)
        usable = ((changed > 0) & changed.isfinite()).all(1, keepdim=True)
        fitted[rows] = torch.where(usable, changed, scales[rows])
        residual = image[:, rows].clone()
        for product, scale in zip(products, fitted[rows].float().T.contiguous(), strict=True):
            residual.addcmul_(product, scale, value=-1)
        descent[:, rows] = residual
        del products
    return fitted, descent


def rows_at_once(n: int, products: int = max(_PRODUCTS.values())) -> int:
    """Return for how many rows of n numbers scales are fitted at a time, with so many products, one per group."""
    return max(_FEWEST, products // (-(-n // GROUP) * n))


def by_group(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sum of every group of a column, (groups, m), for numbers (n, m)."""
    groups, rest = divmod(len(numbers), GROUP)
    sums = numbers[: groups * GROUP].unflatten(0, (groups, GROUP)).sum(1)
    return torch.cat([sums, numbers[-rest:].sum(0, keepdim=True)]) if rest else sums


def spread(scales: torch.Tensor, n: int) -> torch.Tensor:
    """Return the scale of every number, (..., m, n)."""
    return scales.repeat_interleave(GROUP, dim=-1)[..., :n]
