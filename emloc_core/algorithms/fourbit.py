"""Matrices in four bits: NF4 (Dettmers et al., 2023, arXiv 2305.14314) by the kernels of bitsandbytes.

Every 64 numbers share a scale in fp32: a number takes 4.5 bits. Packing what was unpacked in fp32 gives the same bytes
again. A product unpacks the matrix, and once more in the backward pass, so that it is never kept.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional

from emloc_core.errors import EmlocError

#: Numbers that share a scale.
BLOCK = 64
_KIND = "nf4"


def is_installed() -> bool:
    """Return whether bitsandbytes is there."""
    return find_spec("bitsandbytes") is not None


def kernels() -> Any:
    """Return bitsandbytes.

    Raises:
        EmlocError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise EmlocError("Four bits need bitsandbytes, which is not here.", "pip install 'emloc[quant]'") from error
    return bitsandbytes


def sizes(*shape: int) -> tuple[int, int]:
    """Return the numbers of codes (bytes) and of scales of a packed matrix of this shape."""
    count = 1
    for size in shape:
        count *= size
    return -(-count // 2), -(-count // BLOCK)


def pack(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in four bits.

    Args:
        matrix: (m, n), any floating dtype.

    Returns:
        Codes, two a byte, (ceil(m n / 2), 1), uint8; and scales, (ceil(m n / 64),), fp32.
    """
    packed, state = kernels().functional.quantize_4bit(
        matrix.float().contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type=_KIND
    )
    return packed, state.absmax


def unpack(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix of this shape and dtype that :func:`pack` packed, as rounded."""
    kernels()  # defines the operation
    # As one row of an even length: rows of an odd one have no kernel on a CPU, but code that is compiled first.
    row = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, _KIND, [2 * codes.numel()], dtype)
    found: torch.Tensor = row.flatten()[: shape[0] * shape[1]].view(shape)
    return found


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix as it is after :func:`pack` and :func:`unpack`, in fp32."""
    return unpack(*pack(matrix), (matrix.shape[0], matrix.shape[1]), torch.float32)


def nearest(numbers: torch.Tensor) -> torch.Tensor:
    """Return, for every number, the nearest of the 16 in [-1, 1] that codes stand for."""
    levels = kernels().functional.get_4bit_type(_KIND, device=numbers.device).to(numbers)
    found: torch.Tensor = levels[torch.bucketize(numbers.contiguous(), (levels[1:] + levels[:-1]) / 2)]
    return found


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
    found: torch.Tensor = _Product.apply(x, codes, scales, shape, dtype)
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape, ctx.dtype = shape, dtype
        return functional.linear(x.to(dtype), unpack(codes, scales, shape, dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        codes, scales = ctx.saved_tensors
        return gradient.to(ctx.dtype) @ unpack(codes, scales, ctx.shape, ctx.dtype), None, None, None, None
