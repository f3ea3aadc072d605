"""Rank allocators keep to one budget, and spend it where it gains the most."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc_core.algorithms.allocation import (
    BOUNDS,
    Spectrum,
    descending,
    global_budget,
    largest_rank,
    spend,
    uniform,
)
from emloc_core.emulator.ranks import LinearPlan, RankPlan, allocated
from emloc_core.errors import EmlocError

SHAPES = st.lists(st.tuples(st.integers(4, 60), st.integers(4, 60)), min_size=1, max_size=12)
RATIOS = st.floats(0.05, 0.95)


def spectra_of(shapes, seed=0):
    """Random spectra: some steep, some flat, some all zero, as of Linears whose outputs are always 0."""
    generator = torch.Generator().manual_seed(seed)
    spectra = []
    for index, (m, n) in enumerate(shapes):
        decay = float(torch.rand((), generator=generator)) * 0.9 + 0.1
        energies = decay ** torch.arange(min(m, n), dtype=torch.float64) * 10.0 ** (index % 7)
        spectra.append(
            Spectrum(f"l{index}", "b", torch.zeros_like(energies) if index % 5 == 4 else energies, 0.1 + index % 3)
        )
    return spectra


def parameters(shapes, ranks):
    return sum(rank * (m + n) for rank, (m, n) in zip(ranks, shapes, strict=True))


@given(SHAPES)
def test_the_largest_rank_is_the_last_that_is_smaller_than_dense(shapes):
    for m, n in shapes:
        k = largest_rank(m, n)
        assert k * (m + n) < m * n <= (k + 1) * (m + n)


@settings(max_examples=200, deadline=None)
@given(SHAPES, RATIOS, st.integers(0, 1000))
def test_global_keeps_the_budget_floors_and_caps_and_leaves_less_than_a_step(shapes, ratio, seed):
    even = uniform(shapes, ratio)
    ranks = global_budget(shapes, ratio, spectra_of(shapes, seed))
    budget = parameters(shapes, even)
    caps = []
    for rank, k, (m, n) in zip(ranks, even, shapes, strict=True):
        caps.append(max(k, min(int(BOUNDS[1] * k), largest_rank(m, n))))
        assert BOUNDS[0] * k <= rank <= caps[-1]
    spent = parameters(shapes, ranks)
    assert spent <= budget
    if ranks != caps:
        assert budget - spent < max(m + n for m, n in shapes)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=3), st.integers(0, 1000))
def test_spending_is_optimal_where_all_ranks_cost_the_same(caps, seed):
    generator = torch.Generator().manual_seed(seed)
    gains = [torch.rand(cap, dtype=torch.float64, generator=generator).sort(descending=True).values for cap in caps]
    shapes = [(3, 4)] * len(caps)
    for budget in range(0, 7 * sum(caps) + 1, 7):
        ranks = spend(shapes, gains, [0] * len(caps), caps, budget)
        best = max(
            sum(float(gain[:k].sum()) for gain, k in zip(gains, choice, strict=True))
            for choice in itertools.product(*(range(cap + 1) for cap in caps))
            if parameters(shapes, choice) <= budget
        )
        assert sum(float(gain[:k].sum()) for gain, k in zip(gains, ranks, strict=True)) == pytest.approx(best)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_energies_that_rise_become_the_least_concave_majorant(energies):
    kept = [sum(energies[:rank]) for rank in range(len(energies) + 1)]
    least = [
        max(
            kept[a] + (kept[b] - kept[a]) * (rank - a) / max(b - a, 1)
            for a in range(rank + 1)
            for b in range(rank, len(kept))
        )
        for rank in range(1, len(kept))
    ]
    assert descending(torch.tensor(energies, dtype=torch.float64)).cumsum(0).tolist() == pytest.approx(least)


def test_energy_that_comes_late_counts():
    late, flat = torch.tensor([0.0] * 9 + [100.0] * 3 + [0.0] * 20).double(), torch.ones(32, dtype=torch.float64)
    shapes = [(32, 32), (32, 32)]  # of rank 9 if shared out alike
    first, second = global_budget(shapes, 0.6, [Spectrum("a", "b", late, 1.0), Spectrum("b", "b", flat, 1.0)])
    assert (first, second) == (12, 6)


def test_ranks_go_where_they_save_more_a_parameter():
    steep, flat = torch.tensor([100.0] + [1e-6] * 31).double(), torch.ones(32, dtype=torch.float64)
    shapes = [(32, 32), (32, 32)]
    first, second = global_budget(shapes, 0.6, [Spectrum("a", "b", steep, 1.0), Spectrum("b", "b", flat, 1.0)])
    assert first < uniform(shapes, 0.6)[0] < second


def test_ranks_go_where_an_error_disturbs_more():
    energies, shapes = torch.linspace(1, 0.1, 32, dtype=torch.float64), [(32, 32), (32, 32)]
    first, second = global_budget(shapes, 0.6, [Spectrum("a", "b", energies, 1.0), Spectrum("b", "b", energies, 3.0)])
    assert first < uniform(shapes, 0.6)[0] < second


def test_scale_of_the_activations_does_not_matter():
    shapes = [(32, 48), (48, 32), (32, 32)]
    spectra = spectra_of(shapes)
    scaled = [
        Spectrum(spectrum.path, spectrum.block, spectrum.energies * 8.0**index, spectrum.sensitivity)
        for index, spectrum in enumerate(spectra)
    ]
    assert global_budget(shapes, 0.6, spectra) == global_budget(shapes, 0.6, scaled)


def plan_of(shapes):
    return RankPlan(tuple(LinearPlan(f"l{i}", "b", (f"l{i}",), m, n, None, "input") for i, (m, n) in enumerate(shapes)))


def test_a_rank_that_saves_nothing_leaves_the_linear_dense():
    plan = plan_of([(32, 32), (16, 32)]).with_ranks({"l0": 16, "l1": 5})
    assert plan.ranks == {"l1": 5}
    assert "no smaller" in plan.linears[0].reason


def test_ranks_that_make_nothing_smaller_are_refused():
    with pytest.raises(EmlocError, match="nothing becomes smaller"):
        allocated(plan_of([(2, 2)]), 0.5)
