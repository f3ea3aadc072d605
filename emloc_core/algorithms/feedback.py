"""Rounding with feedback: what rounding a column loses, the columns after it make up for.

As in GPTQ (Frantar et al., 2022, arXiv 2210.17323): the loss that counts is that of the outputs, ``||(M - Q) X||``, so
the error of a column is spread over those not rounded yet, in proportion to how their inputs go along with its own.
"""

from collections.abc import Callable

import torch

from emloc_core.algorithms import fourbit

#: Added to the diagonal, as a fraction of its mean: directions that no calibration row has count a little.
DAMPING = 0.01
_COLUMNS = 128  # whose errors are passed on together


def with_feedback(
    matrix: torch.Tensor, gram: torch.Tensor, nearest: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """Round a matrix column by column, in their order.

    Args:
        matrix: M, (m, n), in fp32.
        gram: ``sum x x^T`` of its inputs, (n, n).
        nearest: takes numbers, (m,), and the index of their column, and returns them rounded.

    Returns:
        Q, (m, n), in fp32.
    """
    work, found = matrix.clone(), torch.empty_like(matrix)
    gram = gram.to(work, copy=True)
    gram.diagonal().add_(DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny))
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    for start in range(0, work.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, work.shape[1])
        errors = torch.empty_like(work[:, start:stop])
        for column in range(start, stop):
            values = nearest(work[:, column], column)
            error = (work[:, column] - values) / spread[column, column]
            work[:, column:stop] -= error[:, None] * spread[column, column:stop]
            errors[:, column - start], found[:, column] = error, values
        work[:, stop:] -= errors @ spread[start:stop, stop:]
    return found


def rounded(matrix: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return a matrix in four bits, as it is after being packed and unpacked.

    The scale of a block of numbers is that of its largest, which is kept as it is, so that packing finds it again.

    Args:
        matrix: M, (m, n), any floating dtype.
        gram: ``sum x x^T`` of its inputs, (n, n).

    Returns:
        Q, (m, n), in fp32: :func:`emloc_core.algorithms.fourbit.rounded` gives it back unchanged.
    """
    matrix = matrix.float()
    scales, largest = _blocks(matrix)

    def nearest(numbers: torch.Tensor, column: int) -> torch.Tensor:
        scale = scales[:, column]
        return torch.where(largest[:, column], matrix[:, column], fourbit.nearest(numbers / scale) * scale)

    return fourbit.rounded(with_feedback(matrix, gram, nearest))


def _blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale of every number's block, and where the block's largest number is; both (m, n)."""
    size, count = matrix.shape, matrix.numel()
    padded = torch.nn.functional.pad(matrix.flatten(), (0, -count % fourbit.BLOCK)).view(-1, fourbit.BLOCK)
    scales, at = padded.abs().max(1, keepdim=True)
    largest = torch.zeros_like(padded, dtype=torch.bool).scatter_(1, at, value=True)
    tiny = torch.finfo(matrix.dtype).tiny
    spread = scales.clamp(min=tiny).expand_as(padded)
    return spread.flatten()[:count].view(size), largest.flatten()[:count].view(size)
