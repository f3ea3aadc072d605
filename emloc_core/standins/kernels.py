"""A kernel for GPUs: weights on a few levels, unpacked in one pass.

The operations of torch in its place write the index of every byte and its levels before they are scaled, 13 bytes per
weight; this reads a byte for several weights and writes them once, 2.4 bytes in 16 bits. Torch for CUDA brings Triton
along.
"""

from functools import cache

import torch
import triton
from triton import language as tl

from emloc_core.algorithms.levels import GROUP, LEVELS

#: Weights of a row that a program unpacks.
_BLOCK = 1024


def unpack_levels(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int, count: int, digits: int
) -> torch.Tensor:
    """Return a matrix, (m, n), or a stack of them, as :func:`emloc_core.standins.levels.unpack` does, bit for bit.

    Args:
        codes: (..., bytes, 1), uint8, contiguous.
        scales: (..., m, ceil(n / GROUP)), bf16, contiguous.
        count: of levels.
        digits: codes of a byte.
    """
    matrix = torch.empty(*codes.shape[:-2], m, n, dtype=dtype, device=codes.device)
    grid = (matrix.numel() // max(1, n), triton.cdiv(n, _BLOCK))
    with torch.cuda.device_of(codes):  # Triton launches on the current one
        _unpack[grid](
            codes, scales, _levels(count, dtype, codes.device), matrix, codes.shape[-2], m, n, scales.shape[-1],
            COUNT=count, DIGITS=digits, GROUP=GROUP, BLOCK=_BLOCK,
        )  # fmt: skip
    return matrix


@cache
def _levels(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(LEVELS[count], dtype=dtype, device=device)


@triton.jit
def _unpack(
    codes, scales, levels, matrix, nbytes, m, n, groups,
    COUNT: tl.constexpr, DIGITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    offset = row % m * n + column  # in its own matrix: no byte is of two of them
    code = tl.load(codes + row // m * nbytes + offset // DIGITS, mask=inside, other=0).to(tl.int32)
    for digit in tl.static_range(1, DIGITS):
        code = tl.where(offset % DIGITS >= digit, code // COUNT, code)
    level = tl.load(levels + code % COUNT)
    scale = tl.load(scales + row * groups + column // GROUP, mask=inside, other=0).to(level.dtype)
    tl.store(matrix + row * n + column, level * scale, mask=inside)
