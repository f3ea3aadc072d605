"""Kernels for GPUs: factors on four levels and weights in a trellis code, unpacked in one pass.

The operations of torch in its place write the index of every byte and its levels before they are scaled, 13 bytes per
weight; this reads a byte for several weights and writes them once, 2.4 bytes in 16 bits. Torch for CUDA brings Triton
along.
"""

from functools import cache

import torch
import triton
from triton import language as tl

from emloc_core.algorithms.levels import LEVELS
from emloc_core.algorithms.scales import GROUP
from emloc_core.algorithms.trellis import COUNT, SEGMENT, STATE_BITS, values

#: Rows of a group, and bytes of its columns, that a program of one warp unpacks: so a scale is a scalar to it.
#: A segment has a multiple of these bytes.
_ROWS, _BYTES = 4, 4
#: Weights on four levels that share a byte.
_DIGITS = 4


def unpack_levels(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    """Return a matrix, (m, n), or a stack of them, as :mod:`emloc_core.standins.low_rank_two_bits` unpacks it.

    Args:
        codes: (..., bytes, 1), uint8, contiguous.
        scales: (..., m, ceil(n / GROUP)), bf16, contiguous.
    """
    matrix = torch.empty(*codes.shape[:-2], m, n, dtype=dtype, device=codes.device)
    stack, groups = scales.shape[:-2].numel(), scales.shape[-1]
    grid = (triton.cdiv(m, _ROWS), groups, stack)
    with torch.cuda.device_of(codes):  # Triton launches on the current one
        _unpack_levels[grid](
            codes, scales, _levels(dtype, codes.device), matrix, codes.shape[-2], m, n, groups,
            GROUP=GROUP, DIGITS=_DIGITS, ROWS=_ROWS, num_warps=1,
        )  # fmt: skip
    return matrix


def unpack_trellis(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    """Return a matrix, (m, n), or a stack of them, as :mod:`emloc_core.standins.trellis` unpacks it, bit for bit.

    Args:
        codes: (..., ceil(m / COUNT), n), uint8, contiguous.
        scales: (..., m, ceil(n / GROUP)), bf16, contiguous.
    """
    matrix = torch.empty(*codes.shape[:-2], m, n, dtype=dtype, device=codes.device)
    stack, groups = scales.shape[:-2].numel(), scales.shape[-1]
    grid = (triton.cdiv(codes.shape[-2], _BYTES), groups, stack)
    with torch.cuda.device_of(codes):  # Triton launches on the current one
        _unpack_trellis[grid](
            codes, scales, _values(dtype, codes.device), matrix, codes.shape[-2], m, n, groups,
            COUNT=COUNT, SEGMENT=SEGMENT, STATES=1 << STATE_BITS, GROUP=GROUP, BYTES=_BYTES, num_warps=1,
        )  # fmt: skip
    return matrix


@cache
def _levels(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(LEVELS, dtype=dtype, device=device)


@cache
def _values(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return values().to(device, dtype)


@triton.jit
def _unpack_levels(
    codes, scales, levels, matrix, nbytes, m, n, groups,
    GROUP: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    byte, digit = tl.arange(0, GROUP // DIGITS), tl.arange(0, DIGITS)
    column = group * GROUP + tl.arange(0, GROUP)
    codes += own * nbytes
    lowest, low, high, highest = tl.load(levels), tl.load(levels + 1), tl.load(levels + 2), tl.load(levels + 3)
    for step in tl.static_range(ROWS):
        row = tl.program_id(0) * ROWS + step
        width = tl.where(row < m, n, 0)
        first = row.to(tl.int64) * n + group * GROUP  # in its own matrix: no byte is of two of them
        place = first // DIGITS + byte
        end = tl.where(row < m, nbytes, 0)
        code = tl.load(codes + place, mask=place < end, other=0).to(tl.int32)
        begins = (first % DIGITS).to(tl.int32)
        if begins > 0:  # within a byte, so that what were bytes of the row are parts of two
            after = tl.load(codes + place + 1, mask=place + 1 < end, other=0).to(tl.int32)
            code = (code | after << 8) >> 2 * begins
        code = (code[:, None] >> 2 * digit[None, :]).reshape(GROUP)
        scale = tl.load(scales + (own * m + tl.minimum(row, m - 1)) * groups + group).to(lowest.dtype)
        upper = tl.where(code % 2 > 0, highest * scale, high * scale)
        lower = tl.where(code % 2 > 0, low * scale, lowest * scale)
        value = tl.where(code & 2 > 0, upper, lower)
        tl.store(matrix + (own * m + row) * n + column, value, mask=column < width)


@triton.jit
def _unpack_trellis(
    codes, scales, table, matrix, nbytes, m, n, groups,
    COUNT: tl.constexpr, SEGMENT: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    own, group, first = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0) * BYTES
    column = group * GROUP + tl.arange(0, GROUP)
    codes += (own * nbytes + first) * n + column
    before = tl.where(first % (SEGMENT // COUNT) > 0, n, 0)  # none where a segment begins
    seen = tl.load(codes - 2 * n, mask=column < before, other=0).to(tl.int32) << 8
    seen |= tl.load(codes - n, mask=column < before, other=0).to(tl.int32)
    for byte in tl.static_range(BYTES):
        width = tl.where(first + byte < nbytes, n, 0)
        seen = seen << 8 | tl.load(codes + byte * n, mask=column < width, other=0).to(tl.int32)
        for digit in tl.static_range(COUNT):
            row = (first + byte) * COUNT + digit
            value = tl.load(table + (seen >> 8 - 8 * (digit + 1) // COUNT & STATES - 1))
            scale = tl.load(scales + (own * m + tl.minimum(row, m - 1)) * groups + group).to(value.dtype)
            tl.store(matrix + (own * m + row) * n + column, value * scale, mask=column < tl.where(row < m, n, 0))
