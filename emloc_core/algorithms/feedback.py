"""Rounding with feedback: later columns compensate for the rounding error of earlier ones.

As in GPTQ (Frantar et al., 2022, arXiv 2210.17323): the loss that counts is that of the outputs, ``||(M - Q) X||``, so
the error of a column is spread over those not rounded yet, in proportion to how their inputs go along with its own.
Columns with the largest inputs come first, while the most others are left. Then passes of coordinate descent round
every number again, as is best while all others stay (QuantEase: Behdin et al., 2023, arXiv 2309.01885).
"""

from collections.abc import Callable

import torch

from emloc_core.algorithms import nf4

#: Added to the diagonal, as a fraction of its mean: directions that no calibration row has count a little.
DAMPING = 0.01
_LEAST = 1e-12  # where all inputs are 0: what it takes to invert the Gram in fp32
#: Passes of coordinate descent; more gain next to nothing.
PASSES = 2
_COLUMNS = 64  # whose errors are passed on together

#: Takes numbers, (m,), and the index of their column, and returns them rounded.
Nearest = Callable[[torch.Tensor, int], torch.Tensor]


def damped(gram: torch.Tensor, share: float = DAMPING) -> torch.Tensor:
    """Return a Gram, (n, n), in fp32 and positive definite: with a share of its mean diagonal on the diagonal."""
    gram = gram.to(torch.float32, copy=True)
    gram.diagonal().add_((share * gram.diagonal().mean()).clamp(min=_LEAST))
    return gram


def with_feedback(matrix: torch.Tensor, gram: torch.Tensor, nearest: Nearest) -> torch.Tensor:
    """Round a matrix column by column, those with the largest inputs first.

    Args:
        matrix: M, (m, n), in fp32.
        gram: ``sum x x^T`` of its inputs, (n, n), :func:`damped`.
        nearest: rounds a column.

    Returns:
        Q, (m, n), in fp32.
    """
    order = gram.diagonal().argsort(descending=True)
    # Transposed, so that a column is one stretch of memory.
    work = matrix.T[order]
    found = torch.empty_like(work)
    spread = _inverse_factor(gram, order)
    places = order.tolist()
    for start in range(0, len(work), _COLUMNS):
        stop = min(start + _COLUMNS, len(work))
        errors = torch.empty_like(work[start:stop])
        for column in range(start, stop):
            values = nearest(work[column], places[column])
            error = (work[column] - values) / spread[column, column]
            work[column:stop].addr_(spread[column, column:stop], error, alpha=-1)
            errors[column - start], found[places[column]] = error, values
        work[stop:].addmm_(spread[start:stop, stop:].T, errors, alpha=-1)
    return found.T


def _inverse_factor(gram: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of a Gram whose columns are put in this order, (n, n).

    Each step overwrites the one before: of the widest Linears of a 38B, such a matrix has 3 GB.
    """
    found = gram[order[:, None], order].mT  # LAPACK writes columns
    torch.linalg.cholesky(found, out=found)
    torch.cholesky_inverse(found, out=found)
    return torch.linalg.cholesky(found, upper=True, out=found)


def descended(matrix: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor, nearest: Nearest) -> torch.Tensor:
    """Round every number of a matrix once more, column by column, as is best while the others stay.

    The loss, ``tr (M - Q) G (M - Q)^T``, is quadratic in every number, so what is nearest to its minimum is best.

    Args:
        matrix: M, (m, n), in fp32.
        rounded: Q, (m, n), as it is so far.
        gram: G, (n, n), :func:`damped`.
        nearest: rounds a column.

    Returns:
        Q, (m, n), in fp32, whose loss is no higher.
    """
    found = rounded.T.clone(memory_format=torch.contiguous_format)  # a column is one stretch of memory
    descent = gram @ (matrix.T - found)
    for start in range(0, len(found), _COLUMNS):
        stop = min(start + _COLUMNS, len(found))
        before = found[start:stop].clone()
        for column in range(start, stop):
            values = nearest(found[column] + descent[column] / gram[column, column], column)
            descent[column:stop].addr_(gram[column, column:stop], values - found[column], alpha=-1)
            found[column] = values
        descent[stop:].addmm_(gram[start:stop, stop:].T, found[start:stop] - before, alpha=-1)
    return found.T


def rounded(matrix: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return a matrix in four bits, as it is after being packed and unpacked.

    The scale of a block of numbers is that of its largest, which is kept as it is, so that packing finds it again.

    Args:
        matrix: M, (m, n), any floating dtype.
        gram: ``sum x x^T`` of its inputs, (n, n).

    Returns:
        Q, (m, n), in fp32: :func:`emloc_core.algorithms.nf4.rounded` gives it back unchanged.
    """
    matrix = matrix.float()
    spread, largest = _blocks(matrix)
    return nf4.rounded(_to_scales(matrix, gram, spread, largest))


def rounded_to_scales(matrix: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return a matrix in four bits, whose blocks have scales that are given.

    Args:
        matrix: M, (m, n), any floating dtype.
        gram: ``sum x x^T`` of its inputs, (n, n).
        scales: of the blocks, (ceil(m n / 64),), in fp32.

    Returns:
        Codes, two a byte, (ceil(m n / 2), 1), uint8: :func:`emloc_core.algorithms.nf4.unpack` reads them.
    """
    spread = _spread(scales, matrix.shape)
    nothing = torch.zeros_like(spread, dtype=torch.bool)
    return nf4.codes(_to_scales(matrix.float(), gram, spread, nothing) / spread)


def _to_scales(matrix: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Round a matrix to four bits times the scale of every number, (m, n); ``kept`` says which stay as they are."""
    gram = damped(gram)
    scales, kept, numbers = (part.T.contiguous() for part in (scales, kept, matrix))

    def nearest(values: torch.Tensor, column: int) -> torch.Tensor:
        found = nf4.nearest(values / scales[column]) * scales[column]
        return torch.where(kept[column], numbers[column], found)

    found = with_feedback(matrix, gram, nearest)
    for _ in range(PASSES):
        found = descended(matrix, found, gram, nearest)
    return found


def _blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale of every number's block, and where the block's largest number is; both (m, n)."""
    size, count = matrix.shape, matrix.numel()
    padded = torch.nn.functional.pad(matrix.flatten(), (0, -count % nf4.BLOCK)).view(-1, nf4.BLOCK)
    scales, at = padded.abs().max(1, keepdim=True)
    largest = torch.zeros_like(padded, dtype=torch.bool).scatter_(1, at, value=True)
    return _spread(scales.flatten(), size), largest.flatten()[:count].view(size)


def _spread(scales: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return the scale of every number, not 0, in the shape of the matrix."""
    scales = scales.where(scales != 0, torch.finfo(scales.dtype).tiny)
    return scales.repeat_interleave(nf4.BLOCK)[: size.numel()].view(size)
