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


@torch.library.custom_op("emloc::unpack_levels", mutates_args=())
def unpack_levels(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int, count: int, digits: int
) -> torch.Tensor:
    """Return a matrix, (m, n), as :func:`emloc_core.standins.levels.unpack` does, bit for bit.

    Args:
        codes: uint8, as many as there are bytes.
        scales: (m, ceil(n / GROUP)), bf16.
        dtype: of the matrix.
        m: its rows.
        n: its columns.
        count: of levels.
        digits: codes of a byte.
    """
    matrix = torch.empty(m, n, dtype=dtype, device=codes.device)
    grid = (m, triton.cdiv(n, _BLOCK))
    _unpack[grid](
        codes, scales, _levels(count, dtype, codes.device), matrix, n, scales.stride(0),
        COUNT=count, DIGITS=digits, GROUP=GROUP, BLOCK=_BLOCK,
    )  # fmt: skip
    return matrix


@unpack_levels.register_fake
def _(codes: torch.Tensor, _scales: torch.Tensor, dtype: torch.dtype, m: int, n: int, *_: int) -> torch.Tensor:
    return codes.new_empty(m, n, dtype=dtype)


@cache
def _levels(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(LEVELS[count], dtype=dtype, device=device)


@triton.jit
def _unpack(
    codes, scales, levels, matrix, n, groups,
    COUNT: tl.constexpr, DIGITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    at = row * n + column
    code = tl.load(codes + at // DIGITS, mask=inside, other=0).to(tl.int32)
    for digit in tl.static_range(1, DIGITS):
        code = tl.where(at % DIGITS >= digit, code // COUNT, code)
    level = tl.load(levels + code % COUNT)
    scale = tl.load(scales + row * groups + column // GROUP, mask=inside, other=0).to(level.dtype)
    tl.store(matrix + at, level * scale, mask=inside)
