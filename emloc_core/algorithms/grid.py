"""What numbers of a matrix may be rounded to: a few levels, times a scale of their own or of their group."""

import torch


class Grid:
    """Rounds a column at a time, so matrices are transposed here.

    Args:
        levels: ascending, (l,), fp32.
        scales: of the numbers, not 0, (ceil(n / width), m), fp32, contiguous.
        width: numbers of a row that share a scale.
        kept: which numbers stay as they are, and all numbers; both (n, m), contiguous. None: none stays.

    Attributes:
        middles: between levels, (l - 1,).
    """

    def __init__(
        self,
        levels: torch.Tensor,
        scales: torch.Tensor,
        width: int = 1,
        kept: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.levels, self.middles = levels, middles(levels)
        self.scales, self.width, self.kept = scales, width, kept

    def __call__(self, numbers: torch.Tensor, column: int) -> torch.Tensor:
        """Return numbers of a column of the matrix, (m,), rounded."""
        scale = self.scales[column // self.width]
        found = self.levels.index_select(0, torch.bucketize(numbers / scale, self.middles)).mul_(scale)
        return found if self.kept is None else torch.where(self.kept[0][column], self.kept[1][column], found)


def middles(levels: torch.Tensor) -> torch.Tensor:
    """Return the numbers between levels, (l - 1,), at which rounding changes."""
    return (levels[1:] + levels[:-1]) / 2
