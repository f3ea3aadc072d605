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
        self._between = self.middles[:, None]
        self.scales, self.width, self.kept = scales, width, kept

    def __call__(self, numbers: torch.Tensor, column: int) -> torch.Tensor:
        """Return numbers of a column of the matrix, (m,), rounded."""
        scale = self.scales[column // self.width]
        rounded = self.levels.index_select(0, self.nearest(numbers / scale)).mul_(scale)
        return rounded if self.kept is None else torch.where(self.kept[0][column], self.kept[1][column], rounded)

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the index of the level that is nearest to every number of a column, (m,), int32.

        Every number is compared with all middles: a search, as of ``torch.bucketize``, branches where no processor can
        guess, and takes four times as long.
        """
        above = torch.gt(numbers, self._between, out=numbers.new_empty(self._between.shape[0], numbers.shape[0]))
        return above.sum(0).to(torch.int32)


def indices(numbers: torch.Tensor, middles: torch.Tensor) -> torch.Tensor:
    """Return the index of the level that is nearest to every number of a matrix, uint8: how many middles are below it.

    One middle at a time, since all at once would hold as many matrices.
    """
    counts = torch.zeros_like(numbers, dtype=torch.uint8)
    for middle in middles:
        counts += numbers > middle
    return counts


def middles(levels: torch.Tensor) -> torch.Tensor:
    """Return the numbers between levels, (l - 1,), at which rounding changes."""
    return (levels[1:] + levels[:-1]) / 2
