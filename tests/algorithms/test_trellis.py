"""Matrices in a trellis code: no other bits are nearer, little is lost, and what is packed is read as it was."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compilers import without_compilers
from support.marks import thorough

from emloc_core.algorithms import levels, native, trellis
from emloc_core.algorithms.feedback import MORE_DAMPING, Damped
from emloc_core.algorithms.scales import GROUP
from emloc_core.algorithms.trellis import COUNT, SEGMENT, STATE_BITS, Codes, values
from emloc_core.errors import EmlocError
from emloc_core.settings import CompressSettings
from emloc_core.standins import kernels
from emloc_core.standins.trellis import Trellis, TrellisLinear

BITS = (2, 3, 3)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(numbers, scales):
    states = torch.empty(1, len(numbers), dtype=torch.int16)
    block, first = numbers[None].clone(), torch.zeros(1, dtype=torch.int64)
    native.round_block(block, block.clone(), torch.ones(1, 1), first, Codes(scales[None], values(), states, GROUP))
    assert torch.equal(block[0], values()[states[0].long()] * scales)
    return states[0]


def by_torch(numbers, scales):
    costs, table, before = torch.full((1 << STATE_BITS,), torch.inf), values(), []
    costs[0] = 0
    for row, (number, scale) in enumerate(zip(numbers, scales, strict=True)):
        own = BITS[row % 3]
        least, gone = costs.view(1 << own, -1).min(0)
        before.append(gone)
        costs = least.repeat_interleave(1 << own) + (number - scale * table).square()
    states, state = torch.empty(len(numbers), dtype=torch.int16), int(costs.argmin())
    for row in reversed(range(len(numbers))):
        own = BITS[row % 3]
        states[row] = state
        state >>= own
        state |= int(before[row][state]) << STATE_BITS - own
    return states


def lost(states, numbers, scales):
    return float((values()[states.long()] * scales - numbers).square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_no_other_bits_are_nearer(seed):
    numbers, scales, bits = draw(4, seed=seed), draw(4, seed=seed + 1).abs() + 0.1, (*BITS, BITS[0])
    least = torch.inf
    for choice in product(*(range(1 << own) for own in bits)):
        state, states = 0, []
        for own, new in zip(bits, choice, strict=True):
            state = (state << own | new) % (1 << STATE_BITS)
            states.append(state)
        least = min(least, lost(torch.tensor(states), numbers, scales))
    assert lost(found(numbers, scales), numbers, scales) == pytest.approx(least, rel=1e-5)


def test_every_number_sees_the_bits_of_those_before_it():
    states, before = found(draw(SEGMENT + 50), torch.ones(SEGMENT + 50)), 0
    for row, state in enumerate(states.tolist()):
        before = 0 if row % SEGMENT == 0 else before
        own = BITS[row % 3]
        assert state >> own == before & (1 << STATE_BITS - own) - 1
        before = state


@settings(deadline=None, max_examples=10)
@given(m=st.integers(1, 60), seed=st.integers(0, 99))
def test_bits_are_as_near_as_those_that_torch_finds(m, seed):
    numbers, scales = draw(m, seed=seed), draw(m, seed=seed + 1).abs() + 0.1
    least = lost(by_torch(numbers, scales), numbers, scales)
    assert lost(found(numbers, scales), numbers, scales) == pytest.approx(least, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_segments_are_searched_apart(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    numbers, scales = draw(3 * SEGMENT + 100), torch.ones(3 * SEGMENT + 100)
    apart = [found(part, torch.ones(len(part))) for part in numbers.split(SEGMENT)]
    assert torch.equal(found(numbers, scales), torch.cat(apart))


def test_normal_numbers_lose_little_more_than_any_code_has_to():
    matrix, bound = draw(SEGMENT, GROUP // 2), 2 ** (-16 / 3)
    coded = trellis.rounded(matrix, Damped(torch.eye(GROUP // 2), 0.0), passes=1)
    error = float((coded.numbers() - matrix).square().mean())
    assert bound < error < 1.25 * bound  # six levels: 2.3 times


def test_feedback_and_descent_lower_the_error_of_the_outputs():
    inputs = draw(1000, 100) @ (draw(100, 100, seed=1) * torch.logspace(0, -2, 100)[:, None])
    matrix, gram = draw(96, 100, seed=2), inputs.T @ inputs
    errors = [
        float(((matrix - trellis.rounded(matrix, Damped(used), passes).numbers()) @ inputs.T).norm())
        for used, passes in ((torch.eye(100), 0), (gram, 0), (gram, 2))
    ]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.98 * errors[1]


def test_it_loses_a_third_of_what_four_levels_do():
    inputs, matrix = draw(1000, 100) @ draw(100, 100, seed=1), draw(96, 100, seed=2)
    gram = Damped(inputs.T @ inputs, MORE_DAMPING)
    ours, theirs = trellis.rounded(matrix, gram), levels.rounded(matrix, gram)
    lost_by = [float(((matrix - rounded.numbers()) @ inputs.T).square().sum()) for rounded in (ours, theirs)]
    assert lost_by[0] < 0.35 * lost_by[1]


def unpacked(coded, dtype=torch.float32):
    return TrellisLinear.unpack(coded.codes(), coded.scales, shape=tuple(coded.states.shape), dtype=dtype)


@settings(deadline=None, max_examples=20)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, GROUP + 3)),
        st.tuples(st.integers(SEGMENT - 2, 2 * SEGMENT + 9), st.integers(1, 3)),
    ),
    seed=st.integers(0, 99),
    compiled=st.booleans(),
)
def test_what_is_packed_is_read_as_it_was_rounded(shape, seed, compiled):
    coded = trellis.rounded(draw(*shape, seed=seed), Damped(torch.eye(shape[1])), passes=0)
    read = unpacked(coded) if compiled else without_compilers(unpacked, coded)
    assert torch.equal(read, coded.numbers())


@pytest.mark.parametrize(
    ("stack", "dtype"),
    [
        ((), torch.float32),
        ((), torch.bfloat16),
        ((2,), torch.float16),
        *thorough(((), torch.float16), ((2,), torch.float32), ((2,), torch.bfloat16)),
    ],
)
def test_all_that_unpacks_gives_the_same(stack, dtype, monkeypatch):
    monkeypatch.setattr(native, "_PER_THREAD", 1)
    monkeypatch.setattr(native, "_LARGE", 1)
    m, n = SEGMENT + 7, 300
    codes = torch.randint(256, (*stack, -(-m // COUNT), n), dtype=torch.uint8)
    scales = torch.rand(*stack, m, 2).bfloat16()
    expected = without_compilers(TrellisLinear.unpack, codes, scales, shape=(m, n), dtype=dtype)
    assert torch.equal(TrellisLinear.unpack(codes, scales, shape=(m, n), dtype=dtype), expected)
    if dtype != torch.bfloat16:  # to which the interpreter truncates, where a GPU rounds
        assert torch.equal(kernels.unpack_trellis(codes, scales, dtype, m, n), expected)


@pytest.mark.parametrize("size", [0, 1e-30, 1e12])
@pytest.mark.parametrize("scale", [0, 1e-6, 1e6])
def test_weights_and_inputs_may_be_zero_or_of_any_size(scale, size):
    matrix = scale * draw(8, 30)
    numbers = trellis.rounded(matrix, Damped(size * torch.eye(30))).numbers()
    assert float((numbers - matrix).norm()) <= 0.5 * float(matrix.norm()) + 1e-30


def test_without_a_compiler_the_kind_is_refused(monkeypatch):
    monkeypatch.setattr(native, "library", lambda _: None)
    with pytest.raises(EmlocError, match="cannot be compiled here") as refused:
        Trellis().check(CompressSettings(kind="trellis"))
    assert refused.value.code == "unavailable"
