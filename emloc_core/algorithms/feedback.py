"""Rounding with feedback: later columns compensate for the rounding error of earlier ones.

As in GPTQ (Frantar et al., 2022, arXiv 2210.17323): the loss that counts is the outputs', ``||(M - Q) X||``, so
the error of a column is spread over those not rounded yet, in proportion to how their inputs correlate with its own.
The proportions are the factor U of the Gram, ``G = U D U^T``, which takes no inverse (QuIP: Chee et al., 2023, arXiv
2307.13304, theorem 6). Columns with the largest inputs come first, while the most others are left. Then passes of
coordinate descent round every number again, as is best while all others stay (QuantEase: Behdin et al., 2023, arXiv
2309.01885).

Rows are rounded independently, so matrices that share their inputs can be stacked and rounded as one, and a tall matrix
some rows at a time, which takes less memory.
"""

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch

from emloc_core.algorithms import native
from emloc_core.algorithms.grid import Grid
from emloc_core.algorithms.statistics import Gram, blocks

#: Added to the diagonal, as a fraction of its mean: directions that no calibration row has count a little.
DAMPING = 0.01
#: The same for fewer than four bits (``docs/decisions/0020-six-levels-have-more-damping.md``). Feedback moves errors to
#: where rows have next to no inputs. Tuning moves inputs there, and a LoRA uses the errors that it meets, which the
#: base does not have.
MORE_DAMPING = 0.1
_LEAST = 1e-12  # where all inputs are 0: what it takes to factorise the Gram in fp32
#: Passes of coordinate descent; more gain next to nothing.
PASSES = 2
CHANGES = 256  # columns whose changes are passed on together, and that they are passed on to at a time
#: Rows from which several threads help with a column. With fewer, they mostly wait for each other: on two cores that
#: other processes use too, 1536 rows took ten times as long with two threads as with one.
_SHARED = 4096
#: Rows that are rounded at a time. A GPU needs more of them to be busy.
ROWS = {"cpu": _SHARED, "cuda": 1 << 14}


class RoundsBlocks(Protocol):
    """Rounds blocks of columns, each after the changes of those before it are passed on."""

    def round_block(
        self, block: torch.Tensor, changes: torch.Tensor, factor: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Do what :func:`emloc_core.algorithms.kernels.round_block` does."""

    def descend_block(
        self, block: torch.Tensor, slopes: torch.Tensor, changes: torch.Tensor, curvature: torch.Tensor, start: int
    ) -> None:
        """Do what :func:`emloc_core.algorithms.kernels.descend_block` does."""


#: Takes numbers, (m,), and the index of their column, and returns them rounded; or rounds more at a time.
Nearest = Callable[[torch.Tensor, int], torch.Tensor] | RoundsBlocks


def single(inputs: Gram) -> torch.Tensor:
    """Return a Gram of inputs, (n, n), in fp32; the same tensor until activations are added."""
    return inputs.once("single", lambda: inputs.single)


def damped(inputs: Gram, share: float = DAMPING) -> "Damped":
    """Return a Gram of inputs, damped; for the same Gram and share the same object until activations are added."""
    return inputs.once(("damped", share), lambda: Damped(single(inputs), share))


class Damped:
    """A Gram with a share of its mean diagonal on the diagonal, and what rounding needs of it, computed once.

    Args:
        gram: ``sum x x^T``, (n, n). In fp32 it is not copied: :meth:`matrix` replaces its diagonal meanwhile.
        share: of the mean diagonal.

    Attributes:
        diagonal: (n,), fp32.
    """

    def __init__(self, gram: torch.Tensor, share: float = DAMPING) -> None:
        self._gram = gram.float()
        diagonal = self._gram.diagonal()
        self.diagonal = diagonal + (share * diagonal.mean()).clamp(min=_LEAST)

    @contextmanager
    def matrix(self) -> Iterator[torch.Tensor]:
        """Yield the damped Gram, (n, n), in fp32 and positive definite."""
        diagonal = self._gram.diagonal()
        bare = diagonal.clone()
        diagonal.copy_(self.diagonal)
        try:
            yield self._gram
        finally:
            diagonal.copy_(bare)

    @cached_property
    def order(self) -> torch.Tensor:
        """The columns, (n,), those with the largest inputs first."""
        return self.diagonal.argsort(descending=True)

    @cached_property
    def factor(self) -> torch.Tensor:
        """U, (n, n), of ``U D U^T``, the Gram with its columns in this order; below the diagonal it is undefined."""
        with self.matrix() as gram:
            reordered = gram[self.order[:, None], self.order]
        return _factorised(reordered)


def _factorised(gram: torch.Tensor) -> torch.Tensor:
    """Turn a Gram, (n, n), into U, ``U D U^T``, in its place: by blocks of columns, the last first."""
    for block in reversed(blocks(len(gram))):
        panel, later = gram[: block.stop, block], gram[: block.stop, block.stop :]
        panel.addmm_(later, later[block].T, alpha=-1)
        corner = torch.linalg.cholesky(panel[block].flip(0, 1)).flip(0, 1)
        panel[block] = corner
        above = panel[: block.start]
        above.copy_(torch.linalg.solve_triangular(corner.T, above, upper=False, left=False))
    return gram.div_(gram.diagonal().clone())


def stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return matrices with the same inputs as one, (m, n), in fp32; a single one may be returned itself."""
    first, *others = (matrix.float() for matrix in matrices)
    return torch.cat([first, *others]) if others else first


@contextmanager
def threads_for(rows: int) -> Iterator[None]:
    """Let torch compute with one thread where rows are so few that other threads would mostly wait."""
    before = torch.get_num_threads()
    if rows < _SHARED:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def some_rows(matrix: torch.Tensor, multiple: int = 1) -> Iterator[slice]:
    """Yield slices of the rows of a matrix, as many as are rounded at a time: a multiple of so many."""
    most = ROWS.get(matrix.device.type, ROWS["cuda"]) // multiple * multiple
    yield from (slice(start, start + most) for start in range(0, len(matrix), most))


def with_feedback(matrix: torch.Tensor, gram: Damped, nearest: Nearest) -> torch.Tensor:
    """Round a matrix column by column, those with the largest inputs first.

    Args:
        matrix: M, (m, n), in fp32.

    Returns:
        Q, (m, n), in fp32.
    """
    # Transposed, so that a column is one stretch of memory.
    work = matrix.T[gram.order]

    def visit(columns: slice, changes: torch.Tensor) -> None:
        positions = gram.order[columns]
        torch.index_select(matrix.T, 0, positions, out=changes)
        _round_block(work[columns], changes, gram.factor[columns, columns].contiguous(), positions, nearest)

    _passing_on(work, gram.factor, visit)
    rounded = torch.empty_like(work)
    rounded[gram.order] = work
    return rounded.T


def _round_block(
    block: torch.Tensor, changes: torch.Tensor, factor: torch.Tensor, positions: torch.Tensor, nearest: Nearest
) -> None:
    """Round columns in place; see :func:`emloc_core.algorithms.kernels.round_block`, which does this on a GPU."""
    if not callable(nearest):
        nearest.round_block(block, changes, factor, positions)
        return
    if isinstance(nearest, Grid) and (compiled := kernels_for(block)):
        compiled.round_block(block, changes, factor, positions, nearest)
        return
    steps = zip(block.unbind(), changes.unbind(), factor.unbind(), positions.tolist(), strict=True)
    columns = len(block)  # once: a tensor's length is a function in Python
    with threads_for(block.shape[1]):
        for index, (numbers, change, row, position) in enumerate(steps, start=1):
            values = nearest(numbers, position)
            torch.sub(values, change, out=change)
            numbers.copy_(values)
            if index < columns:
                block[index:].addr_(row[index:], change, alpha=-1)


def descent(matrix: torch.Tensor, rounded: torch.Tensor, gram: Damped) -> torch.Tensor:
    """Return ``(M - Q) G``, (m, n): where numbers of Q, (m, n), have to move for the loss to fall, and how steeply."""
    with gram.matrix() as gram_matrix:
        return (gram_matrix @ (matrix.T - rounded.T)).T


def descended(rounded: torch.Tensor, slopes: torch.Tensor, gram: Damped, nearest: Nearest) -> torch.Tensor:
    """Round every number of a matrix once more, column by column, as is best while the others stay.

    The loss, ``tr (M - Q) G (M - Q)^T``, is quadratic in every number, so what is nearest to its minimum is best.

    Args:
        rounded: Q, (m, n), as it is so far, in fp32, which is overwritten.
        slopes: ``(M - Q) G``, (m, n), which is overwritten; see :func:`descent`.
        gram: G.

    Returns:
        Q, (m, n), in fp32, whose loss is no higher.
    """
    work, slopes = rounded.T.contiguous(), slopes.T.contiguous()  # a column is one stretch of memory
    with gram.matrix() as gram_matrix:

        def visit(columns: slice, changes: torch.Tensor) -> None:
            curvature = gram_matrix[columns, columns].contiguous()
            _descend_block(work[columns], slopes[columns], changes, curvature, columns.start, nearest)

        _passing_on(slopes, gram_matrix, visit)
    return work.T


def _descend_block(
    block: torch.Tensor,
    slopes: torch.Tensor,
    changes: torch.Tensor,
    curvature: torch.Tensor,
    start: int,
    nearest: Nearest,
) -> None:
    """Round columns once more; see :func:`emloc_core.algorithms.kernels.descend_block`, which does this on a GPU."""
    if not callable(nearest):
        nearest.descend_block(block, slopes, changes, curvature, start)
        return
    if isinstance(nearest, Grid) and (compiled := kernels_for(block)):
        compiled.descend_block(block, slopes, changes, curvature, start, nearest)
        return
    diagonal = curvature.diagonal().tolist()
    columns = len(block)
    positions = range(start, start + columns)
    steps = zip(block.unbind(), slopes.unbind(), changes.unbind(), curvature.unbind(), diagonal, positions, strict=True)
    with threads_for(block.shape[1]):
        for index, (numbers, towards, change, row, pivot, position) in enumerate(steps, start=1):
            values = nearest(towards.div_(pivot).add_(numbers), position)
            torch.sub(values, numbers, out=change)
            numbers.copy_(values)
            if index < columns:
                slopes[index:].addr_(row[index:], change, alpha=-1)


def _passing_on(numbers: torch.Tensor, weights: torch.Tensor, visit: Callable[[slice, torch.Tensor], None]) -> None:
    """Visit columns, some at a time, and subtract their changes from later columns, in proportion to ``weights``.

    From the next few columns they are subtracted at once, from all others together: a product with few changes is bound
    by the traffic of the numbers.

    Args:
        numbers: (n, m), transposed: a column is a row.
        weights: (n, n), above the diagonal.
        visit: takes a slice of columns and writes their changes, (columns, m).
    """
    n, m = numbers.shape
    for together in blocks(n, CHANGES):
        changes = numbers.new_empty(together.stop - together.start, m)
        for start in range(together.start, together.stop, native.COLUMNS):
            columns = slice(start, min(start + native.COLUMNS, together.stop))
            own = changes[start - together.start : columns.stop - together.start]
            visit(columns, own)
            following = slice(columns.stop, together.stop)
            numbers[following].addmm_(weights[columns, following].T, own, alpha=-1)
        _subtract(numbers[together.stop :], weights[together, together.stop :].T, changes)


def _subtract(numbers: torch.Tensor, weights: torch.Tensor, changes: torch.Tensor) -> None:
    """Subtract ``weights @ changes``, some rows at a time: oneDNN compiles a kernel for every shape, and keeps it."""
    for part, rows in zip(numbers.split(CHANGES), weights.split(CHANGES), strict=True):
        part.addmm_(rows, changes, alpha=-1)


def kernels_for(numbers: torch.Tensor) -> ModuleType | None:
    """Return the module that rounds numbers to a grid by compiled functions; None where they cannot be compiled."""
    if takes_triton(numbers.device):
        return import_module("emloc_core.algorithms.kernels") if compiles_kernels() else None
    in_c = numbers.device.type == "cpu" and numbers.dtype == torch.float32
    return native if in_c and native.library(native.GRID) else None


def takes_triton(device: torch.device | str) -> bool:
    """Return whether kernels in Triton run on a device, or a type of device: its compiler has a backend for it."""
    return str(getattr(device, "type", device)) in ("cuda", "xpu")


@cache
def compiles_kernels() -> bool:
    """Return whether kernels for GPUs can be compiled: by torch's Triton, a compiler, and Python's headers."""
    has_headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    return native.compiler() is not None and has_headers and find_spec("triton") is not None


def to_levels(
    matrix: torch.Tensor,
    gram: Damped,
    levels: torch.Tensor,
    scales: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round a matrix to levels that are the same everywhere, times the scale of every number.

    Args:
        matrix: M, (m, n), in fp32.
        levels: ascending, in fp32.
        scales: of every number, (m, n), not 0.
        kept: which numbers stay as they are, (m, n); None: none.

    Returns:
        Q, (m, n), in fp32.
    """
    rounded = torch.empty_like(matrix)
    for rows in some_rows(matrix):
        part_kept = None if kept is None else kept[rows]
        rounded[rows] = _to_levels(matrix[rows], gram, levels, scales[rows], part_kept)
    return rounded


def _to_levels(
    matrix: torch.Tensor, gram: Damped, levels: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor | None
) -> torch.Tensor:
    stay = None if kept is None else (kept.T.contiguous(), matrix.T.contiguous())
    grid = Grid(levels, scales.T.contiguous(), kept=stay)
    rounded = with_feedback(matrix, gram, grid)
    for _ in range(PASSES):
        rounded = descended(rounded, descent(matrix, rounded, gram), gram, grid)
    return rounded
