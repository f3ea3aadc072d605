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

#: Weights of a row that a program unpacks.
_BLOCK = 1024


def unpack_levels(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    """Return a matrix, (m, n), or a stack of them, as :mod:`emloc_core.standins.low_rank_two_bits` unpacks it.

    Args:
        codes: (..., bytes, 1), uint8, contiguous.
        scales: (..., m, ceil(n / GROUP)), bf16, contiguous.
    """
    matrix = torch.empty(*codes.shape[:-2], m, n, dtype=dtype, device=codes.device)
    grid = (matrix.numel() // max(1, n), triton.cdiv(n, _BLOCK))
    with torch.cuda.device_of(codes):  # Triton launches on the current one
        _unpack_levels[grid](
            codes, scales, _levels(dtype, codes.device), matrix, codes.shape[-2], m, n, scales.shape[-1],
            GROUP=GROUP, BLOCK=_BLOCK,
        )  # fmt: skip
    return matrix


def unpack_trellis(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    """Return a matrix, (m, n), or a stack of them, as :mod:`emloc_core.standins.trellis` unpacks it, bit for bit.

    Args:
        codes: (..., ceil(m / COUNT), n), uint8, contiguous.
        scales: (..., m, ceil(n / GROUP)), bf16, contiguous.
    """
    matrix = torch.empty(*codes.shape[:-2], m, n, dtype=dtype, device=codes.device)
    grid = (matrix.numel() // max(1, n), triton.cdiv(n, _BLOCK))
    with torch.cuda.device_of(codes):  # Triton launches on the current one
        _unpack_trellis[grid](
            codes, scales, _values(dtype, codes.device), matrix, codes.shape[-2], m, n, scales.shape[-1],
            COUNT=COUNT, SEGMENT=SEGMENT, STATES=1 << STATE_BITS, GROUP=GROUP, BLOCK=_BLOCK,
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
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    offset = row % m * n + column  # in its own matrix: no byte is of two of them
    code = tl.load(codes + row // m * nbytes + offset // 4, mask=inside, other=0).to(tl.int32)
    level = tl.load(levels + (code >> (offset % 4 * 2).to(tl.int32)) % 4)
    scale = tl.load(scales + row * groups + column // GROUP, mask=inside, other=0).to(level.dtype)
    tl.store(matrix + row * n + column, level * scale, mask=inside)


@triton.jit
def _unpack_trellis(
    codes, scales, table, matrix, nbytes, m, n, groups,
    COUNT: tl.constexpr, SEGMENT: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    own = codes + (row // m * nbytes + row % m // COUNT) * n + column
    depth = row % m % SEGMENT // COUNT
    seen = tl.load(own, mask=inside, other=0).to(tl.int32)
    seen |= tl.load(own - n, mask=column < tl.where(depth > 0, n, 0), other=0).to(tl.int32) << 8
    seen |= tl.load(own - 2 * n, mask=column < tl.where(depth > 1, n, 0), other=0).to(tl.int32) << 16
    unseen = (8 - 8 * (row % m % COUNT + 1) // COUNT).to(tl.int32)
    value = tl.load(table + (seen >> unseen) % STATES)
    scale = tl.load(scales + row * groups + column // GROUP, mask=inside, other=0).to(value.dtype)
    tl.store(matrix + row * n + column, value * scale, mask=inside)
