"""The correction against the reference's outputs, and the identity that it has to satisfy."""

import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.adapters import delta
from support.paths import FIXTURES

from emloc_core.algorithms.correction import correct_lora
from emloc_core.algorithms.lora import Lora
from emloc_core.standins import StandIn

DATA = FIXTURES
GOLDEN = load_file(DATA / "emloc_reference_vectors.safetensors")
CASES = json.loads((DATA / "emloc_reference_vectors.json").read_text())
CLAMPS = {"lambda3": 3.0, "lambda05": 0.5, "unclamped": None}


@pytest.mark.parametrize("name", CLAMPS)
@pytest.mark.parametrize("case", CASES)
def test_deltas_equal_those_of_the_reference(case, name):
    weight, emulated = GOLDEN[f"{case}.weight"], GOLDEN[f"{case}.emulated_weight"]
    lora = Lora(GOLDEN[f"{case}.lora_A"], GOLDEN[f"{case}.lora_B"], 1.0)
    (corrected,) = correct_lora(weight, StandIn(emulated), lora, [CLAMPS[name]])
    reference = GOLDEN[f"{case}.corrected_delta.{name}"]
    assert (corrected.b @ corrected.a - reference).norm() / reference.norm() <= 1e-5


def made_up(m=20, n=14, k=5, r=4, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(m, n), draw(m, k), draw(k, n), Lora(draw(r, n), draw(m, r), scale)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 20), n=st.integers(1, 20), k=st.integers(1, 4), r=st.integers(1, 4),
    scale=st.sampled_from([0.5, 1.0, 2.0, 16 / 8**0.5]), seed=st.integers(0, 999),
)  # fmt: skip
@example(m=9, n=6, k=2, r=8, scale=2.0, seed=0)
def test_unclamped_the_base_acts_on_the_subspace_as_the_tuned_emulator_did(m, n, k, r, scale, seed):
    weight, u, v, lora = made_up(m, n, k, r, scale, seed)
    (corrected,) = correct_lora(weight, StandIn(u, v), lora, [None])
    on_subspace = lora.a.T  # columns span the LoRA's input subspace
    emulator = (u @ v + delta(lora)) @ on_subspace
    base = (weight + delta(corrected)) @ on_subspace
    assert torch.allclose(base, emulator, atol=1e-8)
    assert (corrected.a.shape, corrected.b.shape) == (lora.a.shape, lora.b.shape)


def test_off_the_subspace_the_base_is_left_alone():
    weight, u, v, lora = made_up()
    (corrected,) = correct_lora(weight, StandIn(u, v), lora, [None])
    q = torch.linalg.svd(lora.a.T, full_matrices=True).U
    assert (delta(corrected) @ q[:, lora.a.shape[0] :]).abs().max() < 1e-10


def test_clamp_zero_is_the_lora_itself_and_a_large_one_is_no_clamp():
    weight, u, v, lora = made_up()
    uncorrected, huge, free = correct_lora(weight, StandIn(u, v), lora, [0, 1e9, None])
    assert uncorrected is lora
    assert torch.equal(huge.b, free.b)


@pytest.mark.parametrize("clamp", [0.1, 0.5, 3.0])
def test_the_correction_never_exceeds_the_clamp(clamp):
    weight, u, v, lora = made_up()
    (corrected,) = correct_lora(weight, StandIn(u, v), lora, [clamp])
    _, d, zh = torch.linalg.svd(lora.a.T, full_matrices=False)
    b0 = (lora.b @ zh.T) * d
    change = (corrected.b - b0).abs().mean(0)
    assert bool((change <= clamp * b0.abs().mean(0) * (1 + 1e-9)).all())


def test_an_exact_emulator_needs_no_correction():
    weight, _, _, lora = made_up()
    (corrected,) = correct_lora(weight, StandIn(weight), lora, [3.0])
    assert torch.allclose(delta(corrected), delta(lora))


def test_an_untrained_lora_stays_zero_at_a_finite_clamp():
    weight, u, v, lora = made_up()
    (corrected,) = correct_lora(weight, StandIn(u, v), Lora(lora.a, torch.zeros_like(lora.b), 1.0), [3.0])
    assert not bool(corrected.b.any())


def test_half_precision_weights_are_corrected_in_fp32():
    weight, u, v, lora = (made_up(seed=3)[i] for i in range(4))
    weight, u, v = (tensor.bfloat16() for tensor in (weight, u, v))
    lora32 = Lora(lora.a.float(), lora.b.float(), 1.0)
    (half,) = correct_lora(weight, StandIn(u, v), lora32, [None])
    (exact,) = correct_lora(weight.double(), StandIn(u.double(), v.double()), Lora(lora.a, lora.b, 1.0), [None])
    assert torch.allclose(delta(half).double(), delta(exact), atol=1e-4)
