"""Exact steps begin with the second moments that tuning left beside the adapter."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.adapters import contents
from support.jobs import correct_job, polish_job, train_job
from torch import nn

from emloc_core.adapters.moments import FILE, load_moments, tuned_at, write_moments
from emloc_core.errors import EmlocError
from emloc_core.files.shards import write_shard
from emloc_core.settings import CorrectSettings, PolishSettings, TrainSettings

RATE, BETAS = 0.01, (0.9, 0.999)
STEPS = {"learning_rate": RATE, "bf16": False, "logging_steps": 1}


def lora_on_a_linear():
    """A LoRA of rank 1 on a Linear of one input and one output: two numbers."""
    return get_peft_model(nn.Sequential(nn.Linear(1, 1)), LoraConfig(r=1, target_modules=["0"])).double()


def optimiser(lora):
    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, betas=BETAS, weight_decay=0.0, eps=1e-30)


def take_step(lora, optimizer, gradient):
    """Take a step, and return how far the LoRA's numbers moved."""
    before = [parameter.detach().clone() for parameter in lora.parameters() if parameter.requires_grad]
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    after = [parameter.detach() for parameter in lora.parameters() if parameter.requires_grad]
    return [float((new - old).abs().max()) for new, old in zip(after, before, strict=True)]


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_the_mean_square_of_the_gradients(tmp_path_factory, gradients):
    directory, lora = tmp_path_factory.mktemp("moments"), lora_on_a_linear()
    optimizer = optimiser(lora)
    for gradient in gradients:
        take_step(lora, optimizer, gradient)
    write_moments(directory, lora, optimizer, RATE)
    assert tuned_at(directory) == RATE
    weights = [BETAS[1] ** age for age in reversed(range(len(gradients)))]
    mean = sum(weight * gradient**2 for weight, gradient in zip(weights, gradients, strict=True)) / sum(weights)
    moments = load_file(directory / FILE)
    assert sorted(moments) == ["base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"]
    for tensor in moments.values():
        assert tensor.dtype == torch.bfloat16
        assert float(tensor) == pytest.approx(mean, rel=0.005)


@given(st.floats(-8, 0), st.floats(-8, 2))
@settings(max_examples=30, deadline=None)
def test_steps_are_as_small_as_the_gradients_became_and_never_far_beyond_the_rate(tmp_path_factory, before, now):
    directory, lora = tmp_path_factory.mktemp("moments"), lora_on_a_linear()
    tuned = optimiser(lora)
    for _ in range(60):
        take_step(lora, tuned, 10**before)
    write_moments(directory, lora, tuned, RATE)
    optimizer = optimiser(lora)
    load_moments(directory, lora, optimizer)
    moved = [take_step(lora, optimizer, 10**now)[0] for _ in range(60)]
    assert max(moved) <= 1.15 * RATE
    mean = float(load_file(directory / FILE)["base_model.model.0.lora_A.weight"])  # ten steps of that, and one of this
    squared = ((BETAS[1] - BETAS[1] ** 11) * mean + (1 - BETAS[1]) * 10 ** (2 * now)) / (1 - BETAS[1] ** 11)
    momentum = (1 - BETAS[0]) * 10**now / (1 - BETAS[0] ** 11)
    assert moved[0] == pytest.approx(RATE * momentum / squared**0.5, rel=1e-3)
    fresh = lora_on_a_linear()
    assert take_step(fresh, optimiser(fresh), 10**now)[0] == pytest.approx(RATE, rel=0.01)


@pytest.fixture(scope="module")
def tuned(tiny_model, rows_file, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("tuned") / "adapter"
    return train_job(tiny_model, rows_file, output, TrainSettings(steps=12, lora_rank=4, **STEPS)).run()


def polish(adapter, base, rows, output, **changes) -> Path:
    polish_settings = PolishSettings(**{"steps": 2, **STEPS, **changes})
    return polish_job(adapter, base, rows, output, polish_settings).run()


def without_moments(adapter, copy) -> Path:
    shutil.copytree(adapter, copy)
    (copy / FILE).unlink()
    return copy


def distance(one, other):
    """How far apart two adapters' numbers are, on average."""
    one, other = (load_file(directory / "adapter_model.safetensors") for directory in (one, other))
    return float(torch.cat([(one[key] - other[key]).abs().flatten() for key in one]).mean())


def test_polish_begins_with_those_of_tuning(tuned, tiny_model, rows_file, tmp_path):
    plain = without_moments(tuned, tmp_path / "plain")
    one = polish(tuned, tiny_model, rows_file, tmp_path / "one", steps=1)
    other = polish(plain, tiny_model, rows_file, tmp_path / "other", steps=1)
    assert distance(other, plain) == pytest.approx(RATE, rel=0.05)  # without a past every number moves that far
    assert distance(one, tuned) < RATE / 4


def test_they_go_with_the_adapter_from_stage_to_stage(tiny_emulator, tiny_model, rows_file, tmp_path):
    tuned = train_job(tiny_emulator, rows_file, tmp_path / "a", TrainSettings(steps=2, lora_rank=4, **STEPS)).run()
    corrected = correct_job(tuned, tiny_model, tmp_path / "c", CorrectSettings(clamp=1)).run()
    assert (corrected / FILE).read_bytes() == (tuned / FILE).read_bytes()
    polished = polish(corrected, tiny_model, rows_file, tmp_path / "p")
    names = [set(load_file(directory / FILE)) for directory in (tuned, polished)]
    assert names[0] == names[1] == set(load_file(tuned / "adapter_model.safetensors"))
    assert (polished / FILE).read_bytes() != (corrected / FILE).read_bytes()


def test_steps_with_and_without_are_two_requests(tuned, tiny_model, rows_file, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(tuned, adapter)
    output = polish(adapter, tiny_model, rows_file, tmp_path / "polished")
    before = contents(output)
    (adapter / FILE).unlink()
    with pytest.raises(EmlocError, match="second_moments"):
        polish(adapter, tiny_model, rows_file, output)
    assert contents(output) == before


def test_a_dry_run_says_where_there_are_none(emloc, tuned, rows_file, tmp_path):
    plain = without_moments(tuned, tmp_path / "plain")
    for adapter, says in ((tuned, False), (plain, True)):
        code, out, _ = emloc("polish", adapter, "--data", rows_file, "-o", tmp_path / "polished", "--dry-run")
        assert code == 0
        assert ("no second moments" in out) is says


@pytest.mark.thorough
def test_an_optimiser_without_second_moments_leaves_none(tiny_model, rows_file, tmp_path):
    train_settings = TrainSettings(steps=1, lora_rank=4, extra={"optim": "sgd"}, **STEPS)
    plain = train_job(tiny_model, rows_file, tmp_path / "plain", train_settings).run()
    assert not (plain / FILE).exists()
    polish(plain, tiny_model, rows_file, tmp_path / "polished")


def test_an_optimiser_without_second_moments_begins_without(tuned, tiny_model, rows_file, tmp_path):
    polished = polish(tuned, tiny_model, rows_file, tmp_path / "polished", extra={"optim": "sgd"})
    assert not (polished / FILE).exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def negate(path):
    write_shard(path, {key: -tensor for key, tensor in load_file(path).items()})


def of_another_rank(path):
    write_shard(path, {key: tensor[:1] for key, tensor in load_file(path).items()})


@pytest.mark.parametrize(
    ("spoil", "code"), [(cut, "damaged"), (flip, "damaged"), (negate, "not-finite"), (of_another_rank, "mismatch")]
)
def test_what_is_not_theirs_is_one_error(spoil, code, tuned, tiny_model, rows_file, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(tuned, adapter)
    spoil(adapter / FILE)
    with pytest.raises(EmlocError, match=FILE) as caught:
        polish(adapter, tiny_model, rows_file, tmp_path / "polished")
    assert caught.value.code == code
    assert not (tmp_path / "polished").exists()


def test_a_link_to_another_file_is_not_followed(tuned, tiny_model, rows_file, tmp_path):
    adapter = without_moments(tuned, tmp_path / "adapter")
    (adapter / FILE).symlink_to(tuned / FILE)
    with pytest.raises(EmlocError, match="outside"):
        polish(adapter, tiny_model, rows_file, tmp_path / "polished")
