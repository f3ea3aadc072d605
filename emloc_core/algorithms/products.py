"""Products in single precision by the library that is faster here.

torch leaves them to MKL, which uses half the width of an AMD processor's registers. oneDNN uses all of it, but torch
calls it only where the precision may be lower than single. A processor without instructions for that keeps full
precision, which is tested before it is relied on. One with them rounds factors to bfloat16, adds in single precision,
and is two to three times as fast: nothing is lost where the factors are in bfloat16 already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_ONEDNN: Any = torch.backends.mkldnn
_LOWER = "bf16"
_SIDE = 128  # of the matrices of the test
#: Relative error of a product: some 4e-7 in single precision, and 2e-3 where numbers are rounded to bfloat16 first.
_SINGLE = 2e-6


@contextmanager
def by_onednn(*factors: torch.Tensor) -> Iterator[None]:
    """Let oneDNN compute products in single precision on the CPU, where it does so without losing any.

    Args:
        factors: what the factors of all products are copies of, in single precision; nothing if that is not known.
    """
    before = _ONEDNN.matmul.fp32_precision
    if {factor.dtype for factor in factors} == {torch.bfloat16} or _is_precise():
        _ONEDNN.matmul.fp32_precision = _LOWER
    try:
        yield
    finally:
        _ONEDNN.matmul.fp32_precision = before


@cache
def _is_precise() -> bool:
    """Return whether products stay in single precision where torch lets oneDNN lower it."""
    left, right = torch.randn(2, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0), device="cpu")
    exact = left.double() @ right.double()
    before = _ONEDNN.matmul.fp32_precision
    _ONEDNN.matmul.fp32_precision = _LOWER
    try:
        return float((left @ right - exact).norm() / exact.norm()) < _SINGLE
    finally:
        _ONEDNN.matmul.fp32_precision = before
