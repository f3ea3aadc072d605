"""Every class of transformers: streamed while nothing may stay on the device, and exact gradients."""

from functools import cache

import pytest
import torch
from emloc_diffusers import objective
from emloc_diffusers.families import FAMILIES
from emloc_diffusers.flow import Times
from emloc_diffusers.lora_file import FILE, write_for_pipelines
from emloc_diffusers.training import ExactFlow, Pictures
from emloc_diffusers.trial import FlowTrial
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

import emloc_core as emloc
from emloc_core.conformance.tiny import TinyModel, labels
from emloc_core.exact.lora import lora_on
from emloc_core.model.parking import Parking
from emloc_core.model.streaming import Stream
from emloc_core.settings import TrainSettings
from emloc_core.tuning.trl import lora_config

MODELS = {
    label: (family, config)
    for family in FAMILIES
    for label, config in zip(labels(family), family.tiny_configs, strict=True)
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function of a label: the tiny model, saved once."""

    @cache
    def make(label):
        return TinyModel(*MODELS[label], label, tmp_path_factory.mktemp(label))

    return make


@pytest.mark.parametrize("label", MODELS)
def test_rows_wait_with_tensors_of_their_own(label, tiny):
    """On a full GPU what waits is moved to the CPU's memory: two rows may not share it."""
    model = tiny(label)
    own = [tensor for row in model.samples for tensor in row.others.values()]
    stream = Stream(model.skeleton, Parking(0, [*model.skeleton.model.buffers(), *own]))
    outputs = stream.run([lambda row=row: row.run(model.skeleton.model, "cpu") for row in model.samples])
    assert all(torch.equal(one, other) for one, other in zip(outputs, model.forward.logits, strict=True))


@pytest.mark.parametrize("label", MODELS)
def test_exact_gradients_are_those_of_the_ordinary_step_and_every_block_is_read_twice(label, tiny):
    model = tiny(label)
    batch = Pictures(model.samples, None, model.family.auto_class).collate(model.samples)
    assert len(batch["groups"]) == 2  # of two shapes, two pictures each
    settings = lora_config(TrainSettings(lora_rank=3), model.family.lora_targets(), None)
    ordinary = get_peft_model(model.load(model.base.directory), settings)
    for name, parameter in ordinary.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    loss = torch.stack([FlowTrial().loss(ordinary, sample) for sample in model.samples]).mean()
    loss.backward()
    lora = lora_on(model.skeleton, settings)
    set_peft_model_state_dict(lora, get_peft_model_state_dict(ordinary))
    steps = ExactFlow(lora.get_base_model(), model.skeleton)
    assert torch.allclose(steps.loss([batch]), loss, rtol=1e-5)
    expected = {name: parameter.grad for name, parameter in ordinary.named_parameters() if parameter.requires_grad}
    gradients = {name: parameter.grad for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        if gradient is None:  # of a stream that ends there
            assert gradients[name] is None
        else:
            assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-5 * largest), name
    assert {steps.weights.reads[block] for block in model.skeleton.blocks} == {2}
    steps.close()


@pytest.mark.parametrize("label", MODELS)
def test_what_is_written_for_pipelines_is_loaded_exactly(label, tiny, tmp_path):
    model = tiny(label)
    settings = lora_config(TrainSettings(lora_rank=3, lora_alpha=6), model.family.lora_targets(), None)
    lora = get_peft_model(model.load(model.base.directory), settings)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    lora.save_pretrained(tmp_path)
    write_for_pipelines(tmp_path)
    loaded, sample = model.load(model.base.directory), model.samples[0]
    plain = sample.run(loaded, "cpu")
    loaded.load_lora_adapter(load_file(tmp_path / FILE), prefix="transformer")
    with torch.no_grad():
        expected, actual = sample.run(lora.eval(), "cpu"), sample.run(loaded, "cpu")
    assert torch.allclose(actual, expected, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3


class InterruptedStepError(Exception):
    pass


class Interrupts(TrainerCallback):
    def on_step_end(self, _args, state, _control, **_):
        if state.global_step == 2:
            raise InterruptedStepError


@pytest.mark.thorough
@pytest.mark.parametrize("exact", [False, True], ids=["in memory", "exact steps"])
@pytest.mark.parametrize("label", [labels(family)[0] for family in FAMILIES])
def test_interrupted_training_resumes_to_the_same_lora(label, exact, tiny, tmp_path, monkeypatch):
    model = tiny(label)
    rows = list({sample.row: sample.encoded for sample in model.samples}.values())
    monkeypatch.setattr(objective, "encoded", lambda *_: rows)
    monkeypatch.setattr(objective, "times", lambda _: Times("logit-normal"))

    def train(name, *callbacks):
        data = FlowTrial().rows(rows)
        settings = {"steps": 2, "batch_size": 2, "save_steps": 1, "lora_rank": 2, "lora_dropout": 0.1, "bf16": False}
        return emloc.train(
            str(model.base.directory), data, str(tmp_path / name), exact=exact, callbacks=callbacks, **settings
        )

    uninterrupted = train("whole")
    with pytest.raises(InterruptedStepError):
        train("resumed", Interrupts())
    assert not (tmp_path / "resumed").exists()
    assert list(tmp_path.rglob("checkpoint-1"))
    one, other = (
        load_file(adapter.path / "adapter_model.safetensors") for adapter in (uninterrupted, train("resumed"))
    )
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    assert all(torch.equal(one[name], other[name]) for name in one)
