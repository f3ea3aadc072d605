"""The baselines: what defines them, and that none has a lower output error than activation-aware factors."""

import pytest
import svd as baselines
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.factors import gram_of, output_error
from support.jobs import compress_job
from svd import asvd, svd

from emloc_core.algorithms.factorize import factorize, wants_inputs
from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.files.manifest import read_manifest
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import CompressSettings


def drawn(m, n, tokens, seed, scales=None):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    return weight, inputs if scales is None else inputs * scales


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("side", ["input", "output"])
def test_svd_is_the_best_approximation_of_the_weight(m, n, side):
    weight, inputs = drawn(m, n, 40, 0)
    factors = svd(weight, gram_of(weight, inputs, side), 5)
    u, s, vh = torch.linalg.svd(weight)
    assert torch.allclose(factors.u @ factors.v, (u[:, :5] * s[:5]) @ vh[:5])
    assert factors.relative_error() == pytest.approx(output_error(weight, factors, inputs), rel=1e-9)


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12)])
def test_asvd_is_that_of_the_weight_with_scaled_inputs(m, n):
    weight, inputs = drawn(m, n, 40, 0, torch.logspace(-2, 2, n))
    factors = asvd(weight, gram_of(weight, inputs, "input"), 5)
    scales = inputs.square().mean(0).sqrt() ** 0.5  # alpha
    u, s, vh = torch.linalg.svd(weight * scales)
    assert torch.allclose(factors.u @ factors.v, (u[:, :5] * s[:5]) @ vh[:5] / scales)


def test_asvd_with_inputs_of_one_size_is_svd():
    weight, _ = drawn(12, 20, 40, 0)
    inputs = torch.where(torch.rand(40, 20, generator=torch.Generator().manual_seed(1)) < 0.5, -3.0, 3.0)
    gram = gram_of(weight, inputs, "input")
    factors, plain = asvd(weight, gram, 5), svd(weight, gram, 5)
    assert torch.allclose(factors.u @ factors.v, plain.u @ plain.v)
    assert torch.allclose(factors.spectrum, plain.spectrum)


def test_inputs_that_are_always_0_do_no_harm():
    weight, inputs = drawn(20, 12, 40, 0, torch.tensor([0.0, 0.0] + [1.0] * 10))
    factors = asvd(weight, gram_of(weight, inputs, "input"), 12)
    assert output_error(weight, factors, inputs) < 1e-12
    nothing = asvd(weight, gram_of(weight, 0 * inputs, "input"), 3)
    assert nothing.relative_error() == 0
    assert bool(torch.isfinite(nothing.u).all() and torch.isfinite(nothing.v).all())


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    tokens=st.integers(1, 60),
    share=st.floats(0, 1),
    name=st.sampled_from(["svd", "asvd"]),
    outlier=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_the_error_at_every_rank_is_the_true_one_and_never_below_ours(m, n, tokens, share, name, outlier, seed):
    scales = torch.ones(n, dtype=torch.float64)
    scales[0] = outlier
    weight, inputs = drawn(m, n, tokens, seed, scales)
    rank = 1 + int(share * (min(m, n) - 1))
    gram = gram_of(weight, inputs, "input")
    factorizer = {"svd": svd, "asvd": asvd}[name]
    factors, full = factorizer(weight, gram, rank), factorizer(weight, gram, min(m, n))
    assert (factors.u.shape, factors.v.shape, factors.spectrum.shape) == ((m, rank), (rank, n), (min(m, n),))
    assert torch.allclose(factors.u.T @ factors.u, torch.eye(rank, dtype=torch.float64), atol=1e-8)
    # A slice of the factors at full rank is what a lower rank gives, with the error that the spectrum says.
    assert torch.equal(factors.u, full.u[:, :rank])
    if inputs.any():
        assert full.relative_error(rank) == pytest.approx(output_error(weight, factors, inputs), abs=1e-7)
        assert output_error(weight, factorize(weight, gram, rank), inputs) <= factors.relative_error() + 1e-6


def test_asvd_asks_for_the_inputs():
    weight, inputs = drawn(12, 20, 40, 0)
    assert wants_inputs(asvd)
    assert not wants_inputs(svd)
    assert not wants_inputs(factorize)
    with pytest.raises(EmlocError, match="the Gram of the inputs"):
        asvd(weight, gram_of(weight, inputs, "output"), 5)


@pytest.mark.parametrize("calibration", ["base", "propagated"])
def test_emulators_of_them_do_worse_than_activation_aware_factors(tiny_model, rows_file, tmp_path, calibration):
    plugin_manager().register(baselines)
    errors, rows = {}, load_rows(str(rows_file))
    try:
        for name in ("low-rank", "svd", "asvd"):
            options = {"calibration": calibration, "allocator": "uniform", "ratio": 0.6, "samples": 4, "selection": 2}
            job = compress_job(tiny_model, rows, tmp_path / name, CompressSettings(kind=name, **options))
            linears = read_manifest(job.run())["result"]["linears"]
            errors[name] = sum(linear["relative_error"] for linear in linears)
            assert {linear["tap"] for linear in linears} == ({"input"} if name == "asvd" else {"input", "output"})
    finally:
        plugin_manager().unregister(baselines)
    assert errors["low-rank"] < min(errors["svd"], errors["asvd"])
