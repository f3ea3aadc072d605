"""Products in half precisions are those of single precision, rounded once, wherever the processor is slow at them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from emloc_core.compat import halves
from emloc_core.compat.transformers import grouped_product

HALVES = [torch.bfloat16, torch.float16]
ATEN = torch.ops.aten


@pytest.fixture(autouse=True)
def _slow(monkeypatch):
    """A processor that is slow at both, whatever this one is."""
    monkeypatch.setattr(halves, "slow", lambda: frozenset(HALVES))
    before = list(halves._LIBRARY)
    halves.serve()
    yield
    if not before:
        restore()


def restore() -> None:
    while halves._LIBRARY:
        halves._LIBRARY.pop()._destroy()


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[halves.SCRATCH, 1 << 12], ids=["at once", "in tiles"])
def room(request, monkeypatch):
    monkeypatch.setattr(halves, "SCRATCH", request.param)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("room")
def test_products_are_rounded_once(dtype):
    """Compared with fp64 rounded once: single precision may fall on the other side of a middle, by one place."""
    left, right, added = drawn(37, 50, dtype=dtype), drawn(50, 70, dtype=dtype, seed=1), drawn(70, dtype=dtype, seed=2)
    stacks = drawn(3, 37, 50, dtype=dtype), drawn(3, 50, 70, dtype=dtype, seed=1)
    sums = drawn(3, 37, 70, dtype=dtype, seed=4)
    exact = left.double() @ right.double()
    cases = [
        (left @ right, exact),
        (torch.mm(left, right, out=left.new_empty(37, 70)), exact),
        (torch.mm(left, right, out=left.new_empty(0)), exact),
        (functional.linear(left, right.T, added), exact + added.double()),
        (torch.addmm(added, left, right, beta=0.5, alpha=2), 2 * exact + added.double() / 2),
        (sums[0].clone().addmm_(left, right), exact + sums[0].double()),
        (torch.bmm(*stacks), stacks[0].double() @ stacks[1].double()),
        (torch.baddbmm(sums, *stacks, alpha=0.5), sums.double() + stacks[0].double() @ stacks[1].double() / 2),
    ]
    for product, true in cases:
        assert product.dtype == dtype
        torch.testing.assert_close(product.double(), true, rtol=torch.finfo(dtype).eps, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(*[st.integers(0, 40)] * 3),
    batch=st.sampled_from([(), (1,), (3,)]),
    scratch=st.sampled_from([1, 1 << 8, 1 << 12, 1 << 24]),
    turned=st.booleans(),
)
def test_a_product_does_not_depend_on_its_tiles(sizes, batch, scratch, turned):
    m, k, n = sizes
    left = drawn(*batch, m, k)
    right = drawn(*batch, n, k, seed=1).mT if turned else drawn(*batch, k, n, seed=1)
    before, halves.SCRATCH = halves.SCRATCH, scratch
    try:
        product = left @ right
    finally:
        halves.SCRATCH = before
    true = left.double() @ right.double()
    assert product.shape == true.shape
    torch.testing.assert_close(product.double(), true, rtol=2**-7, atol=1e-5)


def test_tiles_take_no_more_than_planned():
    for m, k, n in itertools.product([1, 8, 1024, 100_000], [1, 8, 576, 14_336, 200_000], [1, 8, 576, 152_000]):
        rows, columns = halves._tiles(m, k, n)
        assert 1 <= rows <= m
        assert 1 <= columns <= n
        least = rows <= halves._LEAST or columns <= halves._LEAST
        assert 4 * (rows * k + k * columns + 2 * rows * columns) <= halves.SCRATCH or least


@pytest.mark.usefixtures("room")
def test_gradients_are_those_of_single_precision():
    x, weight = drawn(6, 20, 48).requires_grad_(), drawn(64, 48, seed=1).requires_grad_()
    functional.linear(x, weight).float().square().sum().backward()
    outputs = (x.double() @ weight.double().T).bfloat16().double() * 2
    outputs = outputs.bfloat16().double()
    torch.testing.assert_close(x.grad.double(), outputs @ weight.double(), rtol=2**-7, atol=1e-2)
    true = outputs.flatten(0, 1).T @ x.double().flatten(0, 1)
    torch.testing.assert_close(weight.grad.double(), true, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", [None, "causal", (5, 7), (2, 1, 5, 7), (2, 3, 5, 7)])
@pytest.mark.usefixtures("room")
def test_attention_and_its_gradients(dtype, mask):
    queries, keys, values = (
        drawn(2, 3, length, 8, dtype=dtype, seed=seed).requires_grad_() for seed, length in enumerate((5, 7, 7))
    )
    options = {"is_causal": True} if mask == "causal" else {"attn_mask": None}
    if isinstance(mask, tuple):
        options = {"attn_mask": drawn(*mask, dtype=dtype, seed=5)}
    gradient = drawn(2, 3, 5, 8, dtype=dtype, seed=6)
    attended = functional.scaled_dot_product_attention(queries, keys, values, **options)
    attended.backward(gradient)
    exact = [tensor.detach().double().requires_grad_() for tensor in (queries, keys, values)]
    options = {name: value.double() if torch.is_tensor(value) else value for name, value in options.items()}
    true = functional.scaled_dot_product_attention(*exact, **options)
    true.backward(gradient.double())
    tolerances = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    assert attended.dtype == queries.grad.dtype == dtype
    torch.testing.assert_close(attended.double(), true, **tolerances)
    for half, single in zip((queries, keys, values), exact, strict=True):
        torch.testing.assert_close(half.grad.double(), single.grad, **tolerances)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("room")
def test_convolutions_and_their_gradients(dtype, transposed):
    convolve = functional.conv_transpose2d if transposed else functional.conv2d
    images, weight = drawn(3, 4, 9, 9, dtype=dtype).requires_grad_(), drawn(4, 4, 3, 3, dtype=dtype).requires_grad_()
    bias = drawn(4, dtype=dtype).requires_grad_()
    convolved = convolve(images, weight, bias, stride=2, padding=1)
    convolved.sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (images, weight, bias)]
    true = convolve(*exact, stride=2, padding=1)
    true.sum().backward()
    tolerances = {"rtol": torch.finfo(dtype).eps, "atol": 1e-2}
    torch.testing.assert_close(convolved.double(), true, **tolerances)
    for half, single in zip((images, weight, bias), exact, strict=True):
        assert half.grad.dtype == dtype
        torch.testing.assert_close(half.grad.double(), single.grad, **tolerances)


def test_experts_are_served(monkeypatch):
    """Groups are multiplied by products into a tensor, which autocast knows nothing of."""
    served = []
    monkeypatch.setattr(halves, "_tiles", lambda *sizes: served.append(sizes) or sizes[::2])
    rows, stack = drawn(12, 16), drawn(3, 16, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        product = grouped_product(rows, stack.mT.contiguous(), torch.tensor([4, 4, 12], dtype=torch.int32))
    true = torch.cat([rows[:4].double() @ stack[0].double(), rows[4:].double() @ stack[2].double()])
    torch.testing.assert_close(product.double(), true, rtol=2**-7, atol=1e-5)
    assert served


def test_what_is_fast_is_torchs_own(monkeypatch):
    """Single precision, and one row times a weight, which takes as long as reading the weight."""
    monkeypatch.setattr(halves, "_tiles", None)  # which a served product would call
    single = drawn(4, 4, dtype=torch.float32)
    assert torch.equal(single @ single, torch.einsum("ij,jk->ik", single, single))
    functional.linear(drawn(1, 8), drawn(6, 8))
    with pytest.raises(TypeError):
        drawn(2, 8) @ drawn(8, 6)


def test_what_torch_refuses_is_refused():
    with pytest.raises(RuntimeError, match="dtype"):
        drawn(2, 3) @ drawn(3, 2, dtype=torch.float16)
    with pytest.raises(RuntimeError):
        drawn(2, 3) @ drawn(4, 2)
    with pytest.raises(RuntimeError, match="type"):
        functional.conv2d(drawn(2, 3, 4, 4), drawn(3, 3, 2, 2, dtype=torch.float32))
    assert functional.conv2d(drawn(0, 3, 4, 4), drawn(3, 3, 2, 2)).shape == (0, 3, 3, 3)


def test_nothing_is_overridden_where_no_dtype_in_use_is_slow(monkeypatch):
    restore()
    monkeypatch.setattr(halves, "slow", lambda: frozenset([torch.float16]))
    halves.serve(torch.float32)
    halves.serve()
    assert not halves._LIBRARY
    halves.serve(torch.float16)
    assert halves._LIBRARY


def test_operations_are_torchs_own_again(monkeypatch):
    own = ATEN.mm(drawn(4, 4), drawn(4, 4))
    restore()
    monkeypatch.setattr(halves, "_tiles", None)
    torch.testing.assert_close(ATEN.mm(drawn(4, 4), drawn(4, 4)), own)


@pytest.mark.parametrize(("flag", "seconds", "slow"), [(True, 0.5, False), (True, 40, True), (False, 0.5, True)])
def test_a_flag_alone_is_not_trusted(monkeypatch, flag, seconds, slow):
    """A wrong flag must not cost hours; a processor without instructions is not relied on."""
    monkeypatch.undo()
    operators = torch.ops.mkldnn
    monkeypatch.setattr(operators, "_is_mkldnn_bf16_supported", lambda: flag)
    monkeypatch.setattr(operators, "_is_mkldnn_fp16_supported", lambda: True)
    monkeypatch.setattr(halves, "_seconds", lambda dtype: seconds if dtype == torch.bfloat16 else 1)
    assert (torch.bfloat16 in halves.slow.__wrapped__()) == slow


def test_no_gpu_is_concerned():
    assert halves.is_slow(torch.bfloat16)
    assert not halves.is_slow(torch.bfloat16, "cuda:1")
    assert not halves.is_slow(torch.float32)
    assert halves.scratch("cpu", [torch.float32, torch.bfloat16]) == halves.SCRATCH
    assert halves.scratch("cuda", [torch.bfloat16]) == halves.scratch("cpu", [torch.float32]) == 0
