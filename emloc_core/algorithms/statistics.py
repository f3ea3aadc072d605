"""Second moments of activations: which are gathered, and how they are hooked."""

from typing import Literal

import torch

from emloc_core.errors import EmlocError

Side = Literal["input", "output"]

#: Tokens that are added to a sum at a time.
ROWS = 1024
_BLOCK = 512  # columns of a symmetric product at a time


def cheaper_side(out_features: int, in_features: int) -> Side:
    """Say which Gram of a Linear is the smaller one: that of its outputs, unless it widens."""
    return "output" if out_features <= in_features else "input"


class Gram:
    """A sum of ``x x^T`` over activations.

    Args:
        side: whether the activations are inputs (of every Linear of an input group) or outputs (of one Linear).
        size: number of features.
        dtype: of the sum. On all 210 Linears of SmolLM2-135M fp32 gave at most 1.00002 times the error that fp64 gives.
            It shows where what is cut off is less than 1e-6 of the energy (a relative error of 0.001).
        device: where the sum is kept.
    """

    def __init__(
        self, side: Side, size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.side = side
        self.tokens = 0
        self._sum = torch.zeros(size, size, dtype=dtype, device=device)
        self._rows: list[torch.Tensor] = []
        self._pending = 0

    @property
    def matrix(self) -> torch.Tensor:
        """The sum so far, (size, size), symmetric."""
        self._flush()
        return _mirrored(self._sum)

    def add(self, activations: torch.Tensor) -> None:
        """Add activations of shape (..., size).

        Raises:
            EmlocError: they hold NaN or Inf; the caller adds the sample.
        """
        rows = activations.detach().reshape(-1, activations.shape[-1]).to(self._sum, copy=True)
        if not bool(torch.isfinite(rows.sum())):  # NaN and Inf survive a sum; one pass without a mask
            raise EmlocError("NaN or Inf among the activations")
        self._rows.append(rows)
        self._pending += rows.shape[0]
        self.tokens += rows.shape[0]
        if self._pending >= ROWS:
            self._flush()

    def _flush(self) -> None:
        """Add the rows that wait. Many at a time: a product with few is bound by the traffic of the sum."""
        if self._rows:
            _add_product(self._sum, torch.cat(self._rows))
            self._rows, self._pending = [], 0

    def through(self, weight: torch.Tensor) -> "Gram":
        """Return the Gram of the outputs ``W x`` (without a bias) for these inputs x and W (m, size)."""
        outputs = Gram("output", weight.shape[0], self._sum.dtype, self._sum.device)
        outputs._sum = (weight.to(self._sum) @ self.matrix) @ weight.to(self._sum).T
        outputs.tokens = self.tokens
        return outputs


def symmetric_product(rows: torch.Tensor) -> torch.Tensor:
    """Return ``rows^T rows``, (n, n) for rows (t, n), in little more than half the arithmetic of a plain product."""
    product = rows.new_zeros(rows.shape[1], rows.shape[1])
    _add_product(product, rows)
    return _mirrored(product)


def _add_product(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add ``rows^T rows`` to the blocks on and above the diagonal."""
    for block in _blocks(len(total)):
        total[block, block.start :].addmm_(rows[:, block].T, rows[:, block.start :])


def _mirrored(total: torch.Tensor) -> torch.Tensor:
    """Copy what is above the diagonal's blocks below them, in place."""
    for block in _blocks(len(total)):
        total[block.stop :, block] = total[block, block.stop :].T
    return total


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK)]
