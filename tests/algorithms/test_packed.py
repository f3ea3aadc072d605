"""Products with packed matrices: those of an ordinary Linear, in the same precision."""

import pytest
import torch
from torch.nn import functional

from emloc_core.errors import EmlocError
from emloc_core.standins.layer import product


def through(multiply, x, size):
    """Return a product under autocast, and its input's gradient where all of the product's gradient is ``size``."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = multiply(x)
    output.backward(torch.full_like(output, size))
    return output, x.grad


@pytest.mark.parametrize("size", [1.0, 1e-8], ids=str)
@pytest.mark.parametrize(
    ("dtype", "apart"), [(torch.float16, 0), (torch.bfloat16, 0), (torch.float32, 0.01)], ids=str
)  # in fp32 the gradient is more exact
def test_autocast_computes_as_for_an_ordinary_linear(dtype, apart, size):
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(shape, generator=generator) for shape in ((5, 32), (16, 32)))
    x[0, 0] = 1e5  # too large for fp16
    matrix = matrix.to(dtype)
    ours = through(lambda x: product(x, lambda part: part, matrix), x, size)
    theirs = through(lambda x: functional.linear(x, matrix), x, size)
    for own, expected in zip(ours, theirs, strict=True):
        assert (own - expected).norm() <= apart * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_without_autocast_the_matrix_decides(dtype):
    x, matrix = torch.randn(5, 32), torch.randn(16, 32, dtype=dtype)
    output = product(x, lambda part: part, matrix)
    torch.testing.assert_close(output, functional.linear(x.to(dtype), matrix), rtol=0, atol=0)


def test_whole_numbers_are_refused():
    """Code that casts inputs to the dtype of its weight casts them to that of the packed bytes."""
    with pytest.raises(EmlocError, match="integers"):
        product(torch.ones(2, 3, dtype=torch.uint8), lambda: torch.ones(4, 3))
