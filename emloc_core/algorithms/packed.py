"""Products with packed matrices, which are unpacked in the forward pass, and again in the backward, and never kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from emloc_core.errors import EmlocError


def product(x: torch.Tensor, unpack: Callable[..., torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
    """Return ``x M^T``, (..., m), in the dtype of M, (m, n), or of autocast where that is on. M gets no gradient.

    Args:
        x: (..., n), any floating dtype.
        unpack: returns M from its parts.
        parts: of M.

    Raises:
        EmlocError: x is of whole numbers.
    """
    if not x.is_floating_point():
        raise EmlocError(
            "A packed Linear was given whole numbers: the model's code casts its inputs to the dtype of its weight.",
            "List that Linear in keep_dense of the family's declaration, or choose the kind 'low-rank'.",
            code="unsupported",
        )
    found: torch.Tensor = _Product.apply(x, unpack, *parts)
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, unpack: Callable[..., torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parts)
        ctx.unpack = unpack
        matrix = unpack(*parts)
        return functional.linear(x if torch.is_autocast_enabled(x.device.type) else x.to(matrix.dtype), matrix)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = ctx.saved_tensors  # checkpointing gives them once
        matrix = ctx.unpack(*parts)
        if matrix.dtype == torch.float16:  # in which gradients that autocast takes in bf16 would vanish
            matrix = matrix.to(gradient.dtype)
        return gradient.to(matrix.dtype) @ matrix, None, *(None for _ in parts)
