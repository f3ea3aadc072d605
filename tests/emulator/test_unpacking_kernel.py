"""What unpacks levels in one pass gives what torch gives: Triton's kernel, interpreted, and C."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compilers import without_compilers
from torch._subclasses.fake_tensor import FakeTensorMode

from emloc_core.algorithms import native
from emloc_core.algorithms.scales import GROUP
from emloc_core.standins import kernels, low_rank_two_bits

unpack = low_rank_two_bits.TwoBitLowRankLinear.factor


def packed(m, n, *stack):
    codes = torch.randint(256, (*stack, -(-m * n // 4), 1), dtype=torch.uint8)
    return codes, torch.rand(*stack, m, -(-n // GROUP)).bfloat16()


# The interpreter truncates to bf16, where a GPU rounds.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("stack", [(), (3,)], ids=["matrix", "stack"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 301), (3, 1280)], ids=str)
def test_it_unpacks_what_torch_does(shape, stack, dtype):
    codes, scales = packed(*shape, *stack)
    unpacked = kernels.unpack_levels(codes, scales, dtype, *shape)
    assert torch.equal(unpacked, without_compilers(unpack, codes, scales, shape, dtype))


@pytest.mark.skipif(native.compiler() is None, reason="there is no C compiler")
@settings(deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 900),
    stack=st.sampled_from([(), (1,), (3,)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    threads=st.integers(1, 4),
)
def test_c_unpacks_what_torch_does(m, n, stack, dtype, threads):
    codes, scales = packed(m, n, *stack)
    scales[..., -1, 0] = torch.tensor(torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_PER_THREAD", 1)
        patch.setattr(native, "_LARGE", 1)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        unpacked = unpack(codes, scales, (m, n), dtype)
    expected = without_compilers(unpack, codes, scales, (m, n), dtype)
    torch.testing.assert_close(unpacked, expected, rtol=0, atol=0, equal_nan=True)


def test_torch_unpacks_where_nothing_compiles(monkeypatch):
    codes, scales = packed(5, 300)
    expected = without_compilers(unpack, codes, scales, (5, 300), torch.float32)
    monkeypatch.setattr(native, "compiler", lambda: "cc")
    monkeypatch.setattr(native, "library", lambda _: None)
    assert torch.equal(unpack(codes, scales, (5, 300), torch.float32), expected)


def test_torch_knows_the_operator():
    with FakeTensorMode() as mode:
        codes, scales = (mode.from_tensor(part) for part in packed(7, 300))
        unpacked = low_rank_two_bits.unpack_levels(codes, scales, torch.bfloat16, 7, 300)
    assert (unpacked.shape, unpacked.dtype) == ((7, 300), torch.bfloat16)
