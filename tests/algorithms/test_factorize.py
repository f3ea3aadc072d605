"""The factorisation against the reference's outputs, the textbook method, and its own identities."""

import json
from math import isnan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.factors import gram_of, output_error
from support.paths import FIXTURES

from emloc_core.algorithms.factorize import factorize
from emloc_core.algorithms.factorize import output_error as error_of_outputs
from emloc_core.algorithms.statistics import Gram, cheaper_side, symmetric_product
from emloc_core.errors import EmlocError

DATA = FIXTURES
GOLDEN = load_file(DATA / "emloc_reference_vectors.safetensors")
CASES = json.loads((DATA / "emloc_reference_vectors.json").read_text())


def textbook_error(weight: torch.Tensor, inputs: torch.Tensor, rank: int) -> float:
    """Relative output error of the best rank-k approximation of the outputs, from their singular values."""
    values = torch.linalg.svdvals(inputs.double() @ weight.T.double())
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_those_of_the_reference(case, side, dtype):
    weight, inputs = GOLDEN[f"{case}.weight"], GOLDEN[f"{case}.inputs"]
    factors = factorize(weight, gram_of(weight, inputs, side, dtype), CASES[case]["rank"])
    reference = inputs.double() @ GOLDEN[f"{case}.emulated_weight"].T.double()
    ours = inputs.double() @ factors.v.double().T @ factors.u.double().T
    assert (ours - reference).norm() / reference.norm() <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_error_from_the_spectrum_is_the_true_error(case):
    weight, inputs, rank = GOLDEN[f"{case}.weight"], GOLDEN[f"{case}.inputs"], CASES[case]["rank"]
    factors = factorize(weight, gram_of(weight, inputs, cheaper_side(*weight.shape)), rank)
    assert factors.relative_error() == pytest.approx(output_error(weight, factors, inputs), abs=1e-6)
    assert factors.relative_error() == pytest.approx(CASES[case]["relative_output_error"], abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    tokens=st.integers(1, 60),
    share=st.floats(0, 1),
    side=st.sampled_from(["input", "output"]),
    outlier=st.sampled_from([1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_error_is_the_least_possible(m, n, tokens, share, side, outlier, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    inputs[:, 0] *= outlier
    rank = 1 + int(share * (min(m, n) - 1))
    factors = factorize(weight, gram_of(weight, inputs, side), rank)
    assert factors.u.shape == (m, rank)
    assert factors.v.shape == (rank, n)
    assert torch.allclose(factors.u.T @ factors.u, torch.eye(rank, dtype=torch.float64), atol=1e-8)
    assert output_error(weight, factors, inputs) <= textbook_error(weight, inputs, rank) + 1e-6


@pytest.mark.parametrize(
    ("side", "decay", "dtype"),
    [
        # With the eigenvectors of the whole matrix in fp32, these two are 1.002 times the least error.
        ("input", 6, torch.float32),
        ("output", 6, torch.float32),
        ("input", 20, torch.float64),  # even without what dominates, rounding exceeds what is cut off
    ],
)
def test_fp32_serves_as_far_as_it_resolves_what_is_cut_off(side, decay, dtype):
    """Two directions that dominate, as those of massive activations do, and a spectrum that falls."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(1, 301) / 300
    weight = torch.randn(320, 300, generator=generator)
    inputs = torch.randn(900, 300, generator=generator) * ((-decay * position).exp() / position).sqrt()
    inputs[:, :2] *= 10
    factors = factorize(weight, gram_of(weight, inputs, side, torch.float32), 120)
    least = factorize(weight, gram_of(weight, inputs, side), 120).relative_error()
    assert factors.u.dtype == dtype
    assert output_error(weight, factors, inputs) <= 1.0005 * least
    assert torch.allclose(factors.u.T @ factors.u, torch.eye(120).to(factors.u), atol=1e-5)


@pytest.mark.parametrize(("m", "n", "tokens"), [(64, 256, 5), (64, 64, 8), (96, 96, 2), (48, 200, 12)])
def test_fewer_tokens_than_the_rank_are_answered_exactly(m, n, tokens):
    """Only rounding errors are left of the outputs' Gram, above zero and below it."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(m, n, generator=generator), torch.randn(tokens, n, generator=generator)
    factors = factorize(weight, gram_of(weight, inputs, "input", torch.float32).through(weight), 25)
    assert output_error(weight, factors, inputs) <= 1e-5
    assert torch.allclose(factors.u.T @ factors.u, torch.eye(25).to(factors.u), atol=1e-5)


def massive(kind: str, scale: float, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return activations of 2,048 tokens, (2048, size), of which a few tokens or directions have nearly all energy."""
    inputs = torch.randn(2048, size, generator=generator)
    if kind == "tokens":  # one in 256, each in a direction of its own
        inputs[::256] *= scale
    elif kind == "direction":  # the same for one token in 256
        inputs[::256] += scale * size**0.5 * torch.nn.functional.normalize(inputs[1], dim=0)
    elif kind == "17 tokens":
        inputs[:: len(inputs) // 17] *= scale
    elif kind == "every eighth":
        inputs[::8] *= scale
    elif kind == "every token":  # a direction that all of them share
        inputs += scale * size**0.5 * torch.randn(2048, 1, generator=generator) * inputs[:1] / inputs[0].norm()
    elif kind == "last":  # summed after all others
        inputs[-1] *= scale
    return inputs


@pytest.mark.parametrize(("m", "n"), [(192, 512), (512, 192)])
@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        *[("tokens", scale) for scale in (20, 1e2, 1e3, 3e3, 1e4, 3e4)],
        *[(kind, 1e4) for kind in ("direction", "17 tokens", "every eighth", "every token", "last")],
        ("direction", 3e4),
        ("last", 3e4),
    ],
)
def test_what_is_massive_hides_nothing_from_a_sum_in_fp32(kind, scale, m, n):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator) / n**0.5
    inputs = massive(kind, scale, n, generator)
    gram = Gram(cheaper_side(m, n), min(m, n))
    for sample in inputs.split(128):
        gram.add(sample @ weight.T if gram.side == "output" else sample)
    factors = factorize(weight, gram, 83)
    error = output_error(weight, factors, inputs)
    assert error <= 1.0005 * textbook_error(weight, inputs, 83)
    assert factors.relative_error() == pytest.approx(error, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    inputs_scale=st.floats(-25, 20),
    weight_scale=st.floats(-8, 8),
    side=st.sampled_from(["input", "output"]),
    seed=st.integers(0, 2**16),
)
def test_any_scale_that_fp32_holds_is_factorised_alike(inputs_scale, weight_scale, side, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 20, generator=generator) * 10**weight_scale
    inputs = torch.randn(100, 20, generator=generator) * 10**inputs_scale
    gram = Gram(side, 24 if side == "output" else 20)
    gram.add(inputs.double() @ weight.T.double() if side == "output" else inputs)
    factors = factorize(weight, gram, 8)
    error = output_error(weight, factors, inputs)
    assert error <= 1.0005 * textbook_error(weight, inputs, 8)
    assert factors.relative_error() == pytest.approx(error, rel=1e-3)
    outputs = inputs.double() @ weight.T.double()
    assert factors.spectrum.sum() == pytest.approx(float(outputs.square().sum()), rel=1e-4)


def test_the_heavy_rows_that_are_kept_are_few_and_the_sum_is_that_of_all():
    """A token that is the same in every row, like the first of a sequence: many rows, one direction."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8192, 64, generator=generator)
    rows[::64] += 1e3 * torch.randn(64, generator=generator)
    gram = Gram("input", 64)
    for sample in rows.split(100):
        gram.add(sample)
    rest, heavy = gram.parts()
    assert rest.dtype == torch.float32
    assert len(heavy) == 1
    exact = rows.double().T @ rows.double()
    assert (gram.matrix - exact).norm() <= 1e-12 * exact.norm()
    assert (rest.double() - (exact - heavy.T @ heavy)).norm() <= 1e-5 * rest.norm()
    through = gram.through(torch.eye(64)[:8])
    assert torch.allclose(through.matrix, exact[:8, :8], rtol=1e-9)
    small = gram.through(1e-9 * torch.eye(64)[:8])  # summed in fp64
    for _ in range(2):  # reading it changes nothing
        assert torch.allclose(small.matrix, 1e-18 * exact[:8, :8], rtol=1e-6, atol=0)


def test_columns_that_depend_on_each_other_do_not_break_the_input_side():
    weight = torch.randn(30, 8) @ torch.randn(8, 12)  # of rank 8: Cholesky of W^T W fails or is noise
    inputs = torch.randn(100, 12)
    factors = factorize(weight, gram_of(weight, inputs, "input", torch.float32), 8)
    assert output_error(weight, factors, inputs) <= 1e-5
    assert torch.allclose(factors.u.T @ factors.u, torch.eye(8).to(factors.u), atol=1e-5)


def test_a_symmetric_product_over_several_blocks_is_the_product():
    rows = torch.randn(40, 1100, dtype=torch.float64)
    assert torch.allclose(symmetric_product(rows), rows.T @ rows, atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12), (16, 16)])
def test_full_rank_is_the_weight_itself(m, n):
    weight, inputs = torch.randn(m, n), torch.randn(50, n)
    factors = factorize(weight, gram_of(weight, inputs, cheaper_side(m, n)), min(m, n))
    assert torch.allclose((factors.u @ factors.v).float(), weight, atol=1e-5)


def test_one_spectrum_serves_every_rank():
    weight, inputs = torch.randn(16, 16), torch.randn(100, 16)
    gram = gram_of(weight, inputs, "output")
    full = factorize(weight, gram, 16)
    for rank in (1, 5, 11):
        assert full.relative_error(rank) == pytest.approx(factorize(weight, gram, rank).relative_error(), abs=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_refused(value):
    activations = torch.ones(3, 4)
    activations[1, 2] = value
    with pytest.raises(EmlocError, match="NaN or Inf"):
        Gram("input", 4).add(activations)


def test_an_error_that_is_no_number_is_told():
    gram = torch.eye(4)
    assert isnan(error_of_outputs(torch.full((3, 4), torch.nan), torch.zeros(3, 4), gram))
    assert error_of_outputs(torch.zeros(3, 4), torch.zeros(3, 4), gram) == 0
