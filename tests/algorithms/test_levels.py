"""Matrices on four levels: what they are rounded to, how they are packed, and what feedback is worth."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from emloc_core.algorithms import levels
from emloc_core.algorithms.feedback import MORE_DAMPING, Damped
from emloc_core.algorithms.levels import LEVELS
from emloc_core.algorithms.scales import GROUP
from emloc_core.standins.low_rank_two_bits import TwoBitLowRankLinear, _packed

unpack = TwoBitLowRankLinear.factor


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(matrix, gram):
    return _packed("weight", levels.rounded(matrix, Damped(gram, MORE_DAMPING))).values()


def unpacked(matrix, gram):
    return unpack(*rounded(matrix, gram), tuple(matrix.shape), torch.float32)


def test_every_level_is_the_mean_of_what_is_rounded_to_it():
    borders = [-math.inf, *((a + b) / 2 for a, b in pairwise(LEVELS)), math.inf]

    def density(x):
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    for value, (low, high) in zip(LEVELS, pairwise(borders), strict=True):
        assert value == pytest.approx((density(low) - density(high)) / (below(high) - below(low)), abs=2e-3)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 2 * GROUP + 3), power=st.floats(-6, 6), seed=st.integers(0, 2**16))
def test_without_feedback_every_number_is_rounded_to_the_nearest(m, n, power, seed):
    matrix = draw(m, n, seed=seed) * 10**power
    codes, scales = rounded(matrix, torch.eye(n))
    assert (codes.numel(), scales.numel()) == (-(-m * n // 4), m * -(-n // GROUP))
    numbers = unpack(codes, scales, (m, n), torch.float32)
    choices = scales.float().repeat_interleave(GROUP, 1)[:, :n, None] * torch.tensor(LEVELS)
    nearest = (choices - matrix[..., None]).abs().amin(-1)
    assert torch.allclose((numbers - matrix).abs(), nearest, rtol=1e-4, atol=1e-5 * 10**power)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, GROUP), zeros=st.integers(0, 5), seed=st.integers(0, 99))
def test_scales_are_those_with_which_the_nearest_levels_lose_least(n, zeros, seed):
    matrix = draw(4, n, seed=seed)
    matrix[:, :zeros] = 0
    typical = matrix.square().mean(1, keepdim=True).sqrt()

    def lost(scales):
        choices = scales[..., None] * torch.tensor(LEVELS)
        # A zero is on no level, and no scale changes which level it is rounded to.
        return ((choices - matrix[..., None]).square().amin(-1) * (matrix != 0)).sum(1)

    tried = [lost((share * typical).clamp(min=1e-38).bfloat16().float()) for share in torch.linspace(0.5, 1.5, 21)]
    assert torch.all(lost(levels._scales(matrix).float()) <= torch.stack(tried).amin(0) * 1.0001 + 1e-30)


@pytest.mark.parametrize("size", [0, 1e-30, 1e12])
def test_inputs_may_all_be_zero_or_of_any_size(size):
    matrix = draw(3, 300)
    numbers = unpacked(matrix, size * torch.eye(300))
    assert float((numbers - matrix).norm() / matrix.norm()) < 0.5


def test_what_is_zero_stays_finite():
    numbers = unpacked(torch.zeros(3, 300), torch.eye(300))
    assert float(numbers.abs().max()) < 1e-30


def test_normal_numbers_lose_what_theory_says():
    matrix = draw(64, 4 * GROUP)
    error = (unpacked(matrix, torch.eye(4 * GROUP)) - matrix).square().mean()
    assert error == pytest.approx(0.1175, rel=0.05)  # Max (1960), table 1


def test_feedback_lowers_the_error_of_the_outputs():
    inputs = draw(1000, 100) @ (draw(100, 100, seed=1) * torch.logspace(0, -2, 100)[:, None])
    matrix = draw(40, 100, seed=2)
    lost = [float(((matrix - unpacked(matrix, gram)) @ inputs.T).norm())
            for gram in (inputs.T @ inputs, torch.eye(100))]  # fmt: skip
    assert lost[0] < 0.8 * lost[1]


def test_errors_stay_out_of_directions_without_inputs():
    directions = torch.linalg.qr(draw(256, 256)).Q
    inputs = draw(2000, 256, seed=1) * torch.logspace(0, -3, 256) @ directions.T
    matrix, rare = draw(64, 256, seed=2), directions[:, 128:]
    errors = [matrix - unpacked(matrix, gram) for gram in (inputs.T @ inputs, torch.eye(256))]
    seen, unseen = ([float((error @ vectors).norm()) for error in errors] for vectors in (inputs.T, rare))
    assert seen[0] < 0.4 * seen[1]
    assert unseen[0] < 1.7 * unseen[1]  # with the damping of four bits: twice


def test_what_is_traced_leaves_no_trace():
    codes, scales = rounded(draw(4, 6), torch.eye(6))
    with FakeTensorMode(allow_non_fake_inputs=True):
        unpack(codes, scales, (4, 6), torch.float32)
    assert not isinstance(unpack(codes, scales, (4, 6), torch.float32), FakeTensor)


@pytest.mark.parametrize("n", [1, 300, 1000])
def test_scales_are_the_same_however_many_rows_are_tried_at_a_time(n, monkeypatch):
    matrix = torch.randn(7, n, generator=torch.Generator().manual_seed(n))
    expected = levels._scales(matrix)
    for numbers in (1, 2 * n, 3 * n + 1):
        monkeypatch.setitem(levels._NUMBERS, "cpu", numbers)
        assert torch.equal(levels._scales(matrix), expected)
