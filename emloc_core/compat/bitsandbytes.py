"""bitsandbytes: on processors with AVX-512, weights in four bits are unpacked right, and stay as they are.

Its kernel for these looks for scales as if every row began a block of its own. Where it does not, because rows are no
multiple of 64 numbers (as in SigLIP's MLP, 4304 wide), and are one of 16, most numbers get the scale of another block.
The bytes are right: as one row, they are unpacked right.

On processors that also compute in bfloat16, its layers lay a weight out in another way as soon as a model is evaluated.
That fails for the same widths; and whoever trains on then gets no gradient through the layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from math import prod
from typing import Any
from unittest import mock

_OPERATION = "bitsandbytes::dequantize_4bit"


@contextmanager
def unpacking_as_one_row() -> Iterator[None]:
    """Let the kernels that bitsandbytes registers unpack a matrix as one row; for the import of ``bitsandbytes._ops``.

    That module takes torch's function to register them from torch, for all others.
    """
    from torch import library

    with mock.patch.object(library, "register_kernel", partial(_registered, library.register_kernel)):
        yield


@contextmanager
def keeping_weights() -> Iterator[None]:
    """Let layers leave their weights as they are; for the import of ``bitsandbytes.nn.modules``."""
    from bitsandbytes import functional

    with mock.patch.object(functional, "has_avx512bf16", return_value=False, create=True):
        yield


def _registered(register: Callable[..., Any], operation: Any, devices: Any = None, *kernel: Any, **options: Any) -> Any:
    if operation != _OPERATION or devices != "cpu" or kernel:
        return register(operation, devices, *kernel, **options)
    decorate = register(operation, devices, **options)
    return lambda own: decorate(_as_one_row(own))


def _as_one_row(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kernel)
    def unpack(codes: Any, scales: Any, block: int, kind: str, shape: Sequence[int], dtype: Any) -> Any:
        return kernel(codes, scales, block, kind, [prod(shape)], dtype).reshape(shape)

    return unpack
