"""torch: products in half precisions are computed in single precision where this processor is slow at them.

Checkpoints are in bfloat16 or fp16. Without instructions for these, torch multiplies in a plain loop, which takes 25 to
200 times as long as single precision; so do backward passes of attention and of convolutions. There, torch's own
operations are overridden: they cast, compute in single precision and round once, as a processor with such instructions
does. Whatever multiplies is served, models' own code, autograd and other libraries included, and nothing but the CPU.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch

from emloc_core.compat.private import private

#: Bytes that copies in single precision take at a time. A row, or an image, may take more.
SCRATCH = 24 << 20
_HALVES = (torch.bfloat16, torch.float16)
#: Rows and columns of a tile, at least.
_LEAST = 16
#: Rows and columns of the matrices whose product is timed: 0.1 ms in single precision, and 4 ms in a plain loop.
_SIDE = 192
#: How much longer than in single precision a product may take. Those of processors with instructions take less time.
_SLOWER = 3
_LIBRARY: list[torch.library.Library] = []


@cache
def slow() -> frozenset[torch.dtype]:
    """Return the half precisions in which products take far longer than in single precision on this processor.

    torch says which ones the processor has instructions for. That is confirmed in some milliseconds.
    """
    with private("torch"):
        supported = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        }
    most = _SLOWER * _seconds(torch.float32)
    return frozenset(dtype for dtype in _HALVES if not supported[dtype]() or _seconds(dtype) > most)


def is_slow(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Return whether products in a dtype are computed in single precision on a device."""
    return torch.device(device).type == "cpu" and dtype in slow()


def scratch(device: str, dtypes: Iterable[torch.dtype]) -> int:
    """Return the bytes that copies in single precision take at a time, where products are in these dtypes."""
    return SCRATCH if any(is_slow(dtype, device) for dtype in dtypes) else 0


def serve(dtype: torch.dtype = torch.bfloat16) -> None:
    """Compute this process's products in slow half precisions in single precision, from now on.

    Nothing is overridden where neither the dtype, that of a model, nor autocast's is slow.
    """
    if _LIBRARY or not {dtype, torch.bfloat16} & slow():
        return
    library = torch.library.Library("aten", "IMPL")
    _LIBRARY.append(library)  # operations are torch's own again when it is deleted
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
        for name, operation in _OPERATIONS.items():
            own = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, partial(_dispatched, own, operation), "CPU", with_keyset=True)


def _seconds(dtype: torch.dtype) -> float:
    """Return the least time of a product of two square matrices in a dtype."""
    left, right = torch.ones(2, _SIDE, _SIDE, dtype=dtype, device="cpu")
    least = math.inf
    for _ in range(3):
        started = time.perf_counter()
        left @ right
        least = min(least, time.perf_counter() - started)
    return least


def _dispatched(own: Any, operation: Callable[..., Any], keys: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute an operation of torch, by its own kernel if that is fast or refuses it."""
    factors = args[-2:] if operation in (_product, _sum, _add) else args[:2]
    is_slow = factors[0].dtype in slow() and factors[0].dtype == factors[1].dtype and factors[0].numel()
    if not is_slow or _is_row(*factors):
        return own.call_boxed(keys, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):  # which would cast what is cast here
        return operation(*args, **kwargs)


def _is_row(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether a weight multiplies one row, which takes torch as long as reading the weight."""
    return left.dim() == 2 and len(left) == 1 and right.stride(0) == 1


def _pieces(size: int, width: int) -> Iterator[slice]:
    width = max(1, width)
    return (slice(start, start + width) for start in range(0, size, width))


def _tiles(m: int, k: int, n: int) -> tuple[int, int]:
    """Return how many rows and columns of a product, (m, n), are computed at a time, with their k-wide factors."""
    most = SCRATCH // 4
    side = (math.isqrt(k * k + 2 * most) - k) // 2  # of a square: 2 k side + 2 side^2 numbers
    rows = min(m, max(_LEAST, side))
    columns = min(n, max(_LEAST, (most - k * rows) // max(1, k + 2 * rows)))
    if columns == n:
        rows = min(m, max(_LEAST, (most - k * n) // max(1, k + 2 * n)))
    return rows, columns


def _product(
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    added: torch.Tensor | None = None,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``alpha L R + beta added``, (m, n) or (b, m, n), rounded once."""
    *batch, m, k = left.shape
    n = right.shape[-1]
    out = left.new_empty(0) if out is None else out
    if out.shape != (*batch, m, n):
        out.resize_(*batch, m, n)
    added = None if added is None else added.expand(out.shape)
    if not batch:
        whole, left, right, added = out[None], left[None], right[None], None if added is None else added[None]
    else:
        whole = out
    rows, columns = _tiles(m, k, n)
    at_once = SCRATCH // max(1, 4 * (rows * k + k * columns + 2 * rows * columns))
    for some in _pieces(len(whole), at_once):
        for part in _pieces(m, rows):
            tall = left[some, part].float()
            for across in _pieces(n, columns):
                wide = right[some, :, across].float()
                if added is None:
                    whole[some, part, across] = torch.bmm(tall, wide)
                else:
                    whole[some, part, across] = torch.baddbmm(
                        added[some, part, across].float(), tall, wide, beta=beta, alpha=alpha
                    )
    return out


def _sum(added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **options: Any) -> torch.Tensor:
    return _product(left, right, added=added, **options)


def _add(added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **scales: Any) -> torch.Tensor:
    return _product(left, right, added=added, out=added, **scales)


def _single(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.float() if tensor is not None and tensor.dtype in _HALVES else tensor


def _heads(query: torch.Tensor, key: torch.Tensor, copies: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and heads of attention that are computed at a time, of so many copies of the queries."""
    batch, heads, length, width = query.shape
    each = 4 * copies * max(length, key.shape[2]) * width
    if key.shape[1] != heads:  # several heads share one of the keys
        yield from ((row, slice(None)) for row in _pieces(batch, 1))
        return
    if each * heads <= SCRATCH:
        yield from ((rows, slice(None)) for rows in _pieces(batch, SCRATCH // (each * heads)))
        return
    for row in _pieces(batch, 1):
        for some in _pieces(heads, SCRATCH // each):
            yield row, some


def _of_heads(mask: torch.Tensor | None, rows: slice, heads: slice) -> torch.Tensor | None:
    """Return the part of a mask, (batch or 1, heads or 1, ...) or of fewer dimensions, for rows and heads."""
    if mask is None or mask.dim() < 4:
        return _single(mask)
    mask = mask[rows] if len(mask) > 1 else mask
    return _single(mask[:, heads] if mask.shape[1] > 1 else mask)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float = 0.0, is_causal: bool = False, *,
    attn_mask: torch.Tensor | None = None, scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out = torch.empty_like(query)
    sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    for rows, heads in _heads(query, key, copies=4):
        parts = (tensor[rows, heads].float() for tensor in (query, key, value))
        out[rows, heads], sums[rows, heads] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, dropout, is_causal, attn_mask=_of_heads(attn_mask, rows, heads), scale=scale
        )
    return out, sums


def _attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    sums: torch.Tensor, dropout: float, is_causal: bool, *,
    attn_mask: torch.Tensor | None = None, scale: float | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
    for rows, heads in _heads(query, key, copies=8):
        parts = (tensor[rows, heads].float() for tensor in (gradient, query, key, value, out, sums))
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, dropout, is_causal, attn_mask=_of_heads(attn_mask, rows, heads), scale=scale
        )
        for whole, part in zip(gradients, parts, strict=True):
            whole[rows, heads] = part
    return gradients


def _images(images: torch.Tensor, others: int) -> Iterator[slice]:
    """Yield the images that are convolved at a time, beside so many numbers for all of them."""
    numbers = images.numel() + others
    return _pieces(len(images), SCRATCH * len(images) // max(1, 4 * numbers))


def _convolution(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *layout: Any) -> torch.Tensor:
    weight, bias = weight.float(), _single(bias)
    parts = [
        torch.ops.aten.convolution(images[some].float(), weight, bias, *layout).to(images.dtype)
        for some in _images(images, images.numel())
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _convolution_backward(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, *layout: Any
) -> tuple[torch.Tensor | None, ...]:
    single, backward = weight.float(), torch.ops.aten.convolution_backward
    parts = [
        backward(gradient[some].float(), images[some].float(), single, *layout)
        for some in _images(images, images.numel() + 2 * gradient.numel())
    ]
    of_images, of_weight, of_bias = zip(*parts, strict=True)
    wanted: tuple[bool, ...] = layout[-1]
    return (
        torch.cat(of_images).to(images.dtype) if wanted[0] else None,
        torch.stack(of_weight).sum(0).to(weight.dtype) if wanted[1] else None,
        torch.stack(of_bias).sum(0).to(weight.dtype) if wanted[2] else None,
    )


_OPERATIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("mm", "mm.out", "bmm", "bmm.out"), _product),
    **dict.fromkeys(("addmm", "addmm.out", "baddbmm", "baddbmm.out"), _sum),
    **dict.fromkeys(("addmm_", "baddbmm_"), _add),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}
