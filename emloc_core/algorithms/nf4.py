"""Matrices in four bits: NF4 (Dettmers et al., 2023, arXiv 2305.14314) by the kernels of bitsandbytes.

Every 64 numbers share a scale in fp32: a number takes 4.5 bits. Packing what was unpacked in fp32 gives the same bytes
again. Scales may be packed too, in eight bits ("double quantisation" there): a number then takes 4.13 bits. A product
unpacks the matrix, and once more in the backward pass, so that it is never kept.
"""

from functools import cache, partial
from typing import Any

import torch

from emloc_core.algorithms import packed

#: Numbers that share a scale, and scales that share a range.
BLOCK, SCALES = 64, 256
_KIND = "nf4"


def kernels() -> Any:
    """Return bitsandbytes, which takes a second to import."""
    import bitsandbytes

    return bitsandbytes


def sizes(*shape: int) -> tuple[int, int]:
    """Return the numbers of codes (bytes) and of scales of a packed matrix of this shape."""
    count = 1
    for size in shape:
        count *= size
    return -(-count // 2), -(-count // BLOCK)


def ranges(scales: int) -> int:
    """Return the number of ranges of so many scales that are packed."""
    return -(-scales // SCALES) + 1


def pack(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in four bits.

    Args:
        matrix: (m, n), any floating dtype.

    Returns:
        Codes, two a byte, (ceil(m n / 2), 1), uint8; and scales, (ceil(m n / 64),), fp32.
    """
    codes, state = kernels().functional.quantize_4bit(
        matrix.float().contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type=_KIND
    )
    return codes, state.absmax


def unpack(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix of this shape and dtype that :func:`pack` packed, as rounded."""
    kernels()  # defines the operation
    # As one row of an even length: rows of an odd one have no kernel on a CPU, but code that is compiled first.
    # Kernels on a GPU read scales as fp32, whatever they are: a model may have been cast as a whole.
    row = torch.ops.bitsandbytes.dequantize_4bit(codes, scales.float(), BLOCK, _KIND, [2 * codes.numel()], dtype)
    found: torch.Tensor = row.flatten()[: shape[0] * shape[1]].view(shape)
    return found


def factor_bytes(shape: tuple[int, int], rank: int) -> int:
    """Return the bytes of two factors of a weight of this shape: half per number, and four per 64 for their scale."""
    parts = (sizes(shape[0], rank), sizes(rank, shape[1]))
    return sum(codes + 4 * scales for codes, scales in parts)


def unpack_factors(
    u: torch.Tensor,
    u_scales: torch.Tensor,
    v: torch.Tensor,
    v_scales: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U, (m, k), and V, (k, n), of a weight of this shape, from their codes and scales, which tell k."""
    m, n = shape
    rank = (u.numel() + v.numel()) * 2 // (m + n)
    return unpack(u, u_scales, (m, rank), dtype), unpack(v, v_scales, (rank, n), dtype)


def unpack_scales(codes: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """Return scales that bitsandbytes packed in eight bits, (s,), fp32.

    Args:
        codes: (s,), uint8.
        ranges: (ceil(s / 256) + 1,), fp32: the largest of every 256 scales less the mean of all,
            and that mean.
    """
    levels = scale_levels(codes.device)
    found: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(codes, ranges[:-1], levels, SCALES, ranges.dtype)
    return found + ranges[-1]


@cache
def scale_levels(device: torch.device) -> torch.Tensor:
    """Return the 256 numbers in [-1, 1] that the codes of scales stand for."""
    with torch.device("cpu"):  # whatever device a model is being built on
        found: torch.Tensor = kernels().functional.create_dynamic_map()
    return found.to(device)


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix as it is after :func:`pack` and :func:`unpack`, in fp32."""
    return unpack(*pack(matrix), (matrix.shape[0], matrix.shape[1]), torch.float32)


def codes(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers in [-1, 1] as the codes of the nearest, two a byte: the first in the upper half.

    Args:
        numbers: (m, n), fp32.

    Returns:
        (ceil(m n / 2), 1), uint8.
    """
    _, middles = levels(numbers.device)
    flat = torch.bucketize(numbers.flatten(), middles, out_int32=True).to(torch.uint8)
    pairs = torch.nn.functional.pad(flat, (0, len(flat) % 2)).view(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


@cache
def levels(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 16 numbers that codes stand for, and the middles between them; fp32."""
    levels: torch.Tensor = kernels().functional.get_4bit_type(_KIND, device=device)
    return levels, (levels[1:] + levels[:-1]) / 2


def product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Return ``x M^T``, (..., m), for x (..., n) and a packed matrix M, (m, n), which gets no gradient.

    Args:
        x: any floating dtype.
        codes, scales: see :func:`pack`.
        shape: (m, n).
        dtype: that M is unpacked to, and the product computed in.
    """
    return packed.product(x, partial(unpack, shape=shape, dtype=dtype), codes, scales)
