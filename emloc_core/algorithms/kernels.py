"""Kernels for GPUs: a block of columns rounded with feedback, in one launch in place of some thirty per column.

A program has a few rows of the matrix, one per lane, with all columns of the block in its registers.
"""

from typing import Any

import torch
import triton
from triton import language as tl

from emloc_core.algorithms.grid import Grid

_ROWS = 32


def round_block(
    block: torch.Tensor, changes: torch.Tensor, factor: torch.Tensor, positions: torch.Tensor, grid: Grid
) -> None:
    """Round a block of columns, each after the changes of those before it are passed on.

    Args:
        block: numbers, transposed, (k, m), fp32, with the changes passed on so far; becomes the rounded numbers.
        changes: the original numbers, (k, m); becomes by how much they were changed.
        factor: of the Gram, (k, k), contiguous; only what is above the diagonal counts.
        positions: of the columns in the matrix, (k,), int64.
    """
    _launch(_round, (block, changes), factor, positions, grid)


def descend_block(
    block: torch.Tensor, slopes: torch.Tensor, changes: torch.Tensor, curvature: torch.Tensor, start: int, grid: Grid
) -> None:
    """Round a block of columns once more, each as is best after the ones before it.

    Args:
        block: the rounded numbers, transposed, (k, m), fp32; becomes better ones.
        slopes: of the loss, (k, m).
        changes: (k, m); becomes by how much the numbers were changed.
        curvature: of the Gram, (k, k), contiguous.
        start: the position of the first column in the matrix.
    """
    _launch(_descend, (block, slopes, changes), curvature, start, grid)


def _launch(
    kernel: Any, numbers: tuple[torch.Tensor, ...], weights: torch.Tensor, positions: torch.Tensor | int, grid: Grid
) -> None:
    assert all(tensor.is_contiguous() for tensor in (*numbers, weights)), "kernels know no strides"
    k, m = numbers[0].shape
    kept, originals = grid.kept or (grid.scales, grid.scales)  # not read without KEPT
    with torch.cuda.device_of(weights):  # Triton launches on the current one
        kernel[triton.cdiv(m, _ROWS),](
            *numbers, weights, positions, grid.levels, grid.middles, grid.scales, kept, originals, m, k, grid.width,
            LEVELS=len(grid.levels), KEPT=grid.kept is not None, COLUMNS=triton.next_power_of_2(k), ROWS=_ROWS,
            num_warps=1,
        )  # fmt: skip


@triton.jit
def _nearest(numbers, position, row, inside, levels, middles, scales, kept, originals, m, width, LEVELS, KEPT):
    scale = tl.load(scales + position // width * m + row, mask=inside, other=1)
    unit = numbers / scale
    index = tl.zeros_like(unit).to(tl.int32)
    for middle in tl.static_range(LEVELS - 1):
        index += (unit > tl.load(middles + middle)).to(tl.int32)
    rounded = tl.load(levels + index) * scale
    if KEPT:
        keep = tl.load(kept + position * m + row, mask=inside, other=0)
        rounded = tl.where(keep, tl.load(originals + position * m + row, mask=inside, other=0), rounded)
    return rounded


@triton.jit
def _round(
    block, changes, factor, positions, levels, middles, scales, kept, originals, m, k, width,
    LEVELS: tl.constexpr, KEPT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < m
    column = tl.arange(0, COLUMNS)
    # What is outside is not stored, and loaded without a mask, which would take registers.
    within = tl.minimum(column, k - 1)[:, None] * m + tl.minimum(row, m - 1)[None, :]
    numbers = tl.load(block + within)
    for index in range(k):
        current = (column == index)[:, None]
        number = tl.sum(tl.where(current, numbers, 0), 0)
        position = tl.load(positions + index)
        value = _nearest(
            number, position, row, inside, levels, middles, scales, kept, originals, m, width, LEVELS, KEPT
        )
        change = value - tl.load(changes + index * m + row, mask=inside, other=0)
        tl.store(changes + index * m + row, change, mask=inside)
        later = tl.load(factor + index * k + column, mask=(column > index) & (column < k), other=0)
        tl.store(block + index * m + row, value, mask=inside)  # not all at the end: addresses would take registers
        numbers -= later[:, None] * change[None, :]


@triton.jit
def _descend(
    block, slopes, changes, curvature, start, levels, middles, scales, kept, originals, m, k, width,
    LEVELS: tl.constexpr, KEPT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < m
    column = tl.arange(0, COLUMNS)
    # What is outside is not stored, and loaded without a mask, which would take registers.
    within = tl.minimum(column, k - 1)[:, None] * m + tl.minimum(row, m - 1)[None, :]
    towards = tl.load(slopes + within)
    for index in range(k):
        slope = tl.sum(tl.where((column == index)[:, None], towards, 0), 0)
        number = tl.load(block + index * m + row, mask=inside, other=0)
        value = _nearest(
            slope / tl.load(curvature + index * k + index) + number,
            start + index, row, inside, levels, middles, scales, kept, originals, m, width, LEVELS, KEPT,
        )  # fmt: skip
        change = value - number
        tl.store(block + index * m + row, value, mask=inside)
        tl.store(changes + index * m + row, change, mask=inside)
        later = tl.load(curvature + index * k + column, mask=(column > index) & (column < k), other=0)
        towards -= later[:, None] * change[None, :]
