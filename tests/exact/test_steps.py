"""Exact steps: every gradient is that of the ordinary step on the whole model, and every block is read twice."""

import os
import weakref
from collections import Counter
from functools import cache
from unittest import mock

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from support.marks import thorough
from torch.nn.functional import cross_entropy

from emloc_core.conformance.tiny import TinyModel, labels, random_model
from emloc_core.errors import EmlocError
from emloc_core.exact.boundaries import Boundaries
from emloc_core.exact.head import PIECES, Head
from emloc_core.exact.lora import lora_on
from emloc_core.exact.steps import ExactSteps
from emloc_core.model.blocks import block_paths
from emloc_core.model.lockstep import units
from emloc_core.model.parking import Parking
from emloc_core.model.pinned import PinnedMemory
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import TrainSettings
from emloc_core.tuning.trl import lora_config

MODELS = {
    label: (family, config)
    for family in plugin_manager().families()
    if family.objective == "tokens"
    for label, config in zip(labels(family), family.tiny_configs, strict=True)
}
FIRST = next(label for label in MODELS if label.startswith("llama"))
#: The same as cases, of which the first of a family is enough for `make test`.
FIRST_OF_EACH = [
    pytest.param(label, marks=() if config is family.tiny_configs[0] else pytest.mark.thorough)
    for label, (family, config) in MODELS.items()
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function of a label: the tiny model, saved once."""

    @cache
    def make(label):
        return TinyModel(*MODELS[label], label, tmp_path_factory.mktemp(label.replace("+", "-")))

    return make


def micro_batches(model, count):
    """So many batches of one row each, of unlike lengths, with images where the model takes them."""
    samples = [model.samples[index % len(model.samples)] for index in range(count)]
    if count == 1:
        samples = model.samples[-1:]
    batches = []
    for index, sample in enumerate(samples):
        inputs = sample.inputs("cpu")
        answers = inputs["input_ids"].clone()
        answers[:, : 2 + index] = -100  # a prompt
        batches.append({**inputs, "labels": answers})
    return batches


def lora_of(model, dropout=0.0):
    return lora_config(TrainSettings(lora_rank=3, lora_dropout=dropout), model.family.lora_targets())


def ordinary(model, batches, dropout=0.0, seeds=None):
    """A LoRA on the whole model, with its gradients of micro-batch after micro-batch, and the loss."""
    torch.manual_seed(1)
    lora = get_peft_model(random_model(model.family, model.config), lora_of(model, dropout)).train()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return lora, gradients_of(lora, batches, seeds)


def gradients_of(lora, batches, seeds=None):
    """Add an ordinary step's gradients, and return its loss."""
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    loss = torch.zeros(())
    for batch, seed in zip(batches, seeds or [0] * len(batches), strict=True):
        torch.manual_seed(seed)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = lora(**inputs, use_cache=False).logits[0, :-1].float()
        part = cross_entropy(logits, batch["labels"][0, 1:], reduction="sum") / total
        part.backward()
        loss += part.detach()
    return loss


def exact(model, state, dropout=0.0, **options):
    torch.manual_seed(1)
    lora = lora_on(model.skeleton, lora_of(model, dropout)).train()
    set_peft_model_state_dict(lora, state)
    return lora, ExactSteps(lora.get_base_model(), model.skeleton, **options)


def gradients(lora):
    return {name: parameter.grad for name, parameter in lora.named_parameters() if parameter.requires_grad}


def require_equal(lora, expected):
    actual, wanted = gradients(lora), gradients(expected)
    assert actual.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if gradient is None:  # a tower that no row reaches
            assert actual[name] is None, name
        else:
            assert torch.equal(actual[name], gradient), name


def seeds_of(count):
    """The seeds that a step draws for its micro-batches after ``torch.manual_seed(5)``."""
    torch.manual_seed(5)
    return torch.randint(2**63 - 1, (count,)).tolist()


@pytest.mark.parametrize(("count", "dropout"), [*thorough((1, 0.0)), (4, 0.3)])
@pytest.mark.parametrize("label", FIRST_OF_EACH)
def test_every_gradient_is_that_of_the_ordinary_step_and_every_block_is_read_twice(label, count, dropout, tiny):
    model = tiny(label)
    batches = micro_batches(model, count)
    expected, loss = ordinary(model, batches, dropout, seeds_of(count))
    lora, steps = exact(model, get_peft_model_state_dict(expected), dropout)
    blocks = block_paths(model.meta, model.family)
    reached = [name for name, gradient in gradients(expected).items() if gradient is not None]
    used = [block for block in blocks if any(f".{block}." in name for name in reached)]
    for _ in range(2):  # the second time with what is read ahead
        lora.zero_grad()
        steps.weights.reads.clear()
        torch.manual_seed(5)
        assert torch.allclose(steps.loss(batches), loss, rtol=1e-6)
        require_equal(lora, expected)
        assert used
        assert {block: steps.weights.reads[block] for block in blocks} == {b: 2 * (b in used) for b in blocks}
    steps.close()


@pytest.fixture
def case(tiny):
    """A tiny model, its micro-batches, and what the ordinary step finds."""
    model = tiny(FIRST)
    batches = micro_batches(model, 4)
    return model, batches, *ordinary(model, batches)


def test_ten_steps_go_as_ordinary_ones(case):
    model, batches, ordinary, _ = case
    lora, steps = exact(model, get_peft_model_state_dict(ordinary))
    losses, expected = [], []
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (lora, ordinary)]
    for step in range(10):
        batch = [batches[step % 4], batches[(step + 1) % 4]]
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(float(steps.loss(batch)))
        expected.append(float(gradients_of(ordinary, batch)))
        for optimizer in optimizers:
            optimizer.step()
    assert losses == pytest.approx(expected, rel=1e-6)
    assert losses[-1] < losses[0]


def test_boundaries_may_wait_in_the_memory_of_the_cpu_or_in_a_file(case, tmp_path, monkeypatch):
    model, batches, expected, _ = case
    monkeypatch.setattr("emloc_core.exact.boundaries._SMALL", 0)
    for boundaries in (Boundaries(room=0), Boundaries(room=2000), Boundaries(room=0, directory=tmp_path)):
        lora, steps = exact(model, get_peft_model_state_dict(expected), boundaries=boundaries)
        for _ in range(2):
            lora.zero_grad()
            steps.loss(batches)
            require_equal(lora, expected)
    assert not list(tmp_path.iterdir())  # the file has no name


def test_rows_that_wait_may_leave_the_device_without_parameters_that_all_share(case, monkeypatch):
    model, batches, expected, _ = case
    monkeypatch.setattr(Parking, "on", lambda _, shared: Parking(0, shared))
    monkeypatch.setattr("emloc_core.exact.steps.units", lambda *args: [u for u in units(*args) if u != "model.norm"])
    lora, steps = exact(model, get_peft_model_state_dict(expected))
    backbone = steps.model.model
    backbone.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "shared": backbone.norm.weight}), with_kwargs=True
    )
    steps.loss(batches)
    require_equal(lora, expected)


@pytest.mark.parametrize("dropout", [*thorough(0.0), 0.3])
def test_boundaries_that_blocks_are_given_by_name_wait_too(dropout, tiny, monkeypatch):
    monkeypatch.setattr("emloc_core.exact.boundaries._SMALL", 0)
    model = tiny(FIRST)
    batches = micro_batches(model, 2)
    expected, _ = ordinary(model, batches, dropout, seeds_of(2))
    away = []
    for is_named in (False, True):
        lora, steps = exact(model, get_peft_model_state_dict(expected), dropout, boundaries=Boundaries(room=0))
        if is_named:
            for block in block_paths(model.meta, model.family):
                steps.model.get_submodule(block).register_forward_pre_hook(by_name, with_kwargs=True)
        with mock.patch.object(Boundaries, "_store", autospec=True, side_effect=Boundaries._store) as store:
            torch.manual_seed(5)
            steps.loss(batches)
        require_equal(lora, expected)
        away.append([call.args[1].shape for call in store.call_args_list])
    assert away[0] == away[1] != []


def test_boundaries_come_back_as_they_lay_in_memory(case, tmp_path, monkeypatch):
    monkeypatch.setattr("emloc_core.exact.boundaries._SMALL", 0)
    model, batches, ordinary, _ = case
    loras = []
    for boundaries in (None, Boundaries(room=0), Boundaries(room=0, directory=tmp_path)):
        lora, steps = exact(model, get_peft_model_state_dict(ordinary), boundaries=boundaries)
        for layer in steps.model.model.layers:
            layer.register_forward_pre_hook(lambda _, args: (args[0].mT.contiguous().mT, *args[1:]))
        steps.loss(batches)
        loras.append(lora)
    for lora in loras[1:]:
        require_equal(lora, loras[0])


def by_name(block, args, kwargs):  # noqa: ARG001 - what a hook is given
    """Give a block its hidden states as diffusers does."""
    return (), {"hidden_states": args[0], **kwargs}


def test_what_fits_the_room_is_read_once(case):
    model, batches, expected, _ = case
    block = sum(p.numel() * p.itemsize for p in model.meta.get_submodule("model.layers.0").parameters())
    lora, steps = exact(model, get_peft_model_state_dict(expected), room=10**9)
    with mock.patch.object(PinnedMemory, "leave") as leave:
        for _ in range(2):
            lora.zero_grad()
            steps.loss(batches)
            require_equal(lora, expected)
    assert steps.weights.reads == Counter(call.args[0] for call in leave.call_args_list)
    assert set(steps.weights.reads.values()) == {1}
    embedding = model.meta.get_input_embeddings().weight
    lora, steps = exact(model, get_peft_model_state_dict(expected), room=embedding.numel() * 4 + block)
    steps.loss(batches)
    steps.loss(batches)
    reads = steps.weights.reads
    assert [reads[f"model.layers.{index}"] for index in range(3)] == [1, 4, 4]


def test_two_units_at_most_are_in_memory(case, monkeypatch):
    model, batches, expected, _ = case
    _, steps = exact(model, get_peft_model_state_dict(expected))
    alive, most, inner = {}, [], steps.weights._read

    def read(unit):
        tensors = inner(unit)
        for tensor in tensors.values():
            alive[id(tensor)] = unit
            weakref.finalize(tensor, alive.pop, id(tensor))
        most.append(len(set(alive.values())))
        return tensors

    monkeypatch.setattr(steps.weights, "_read", read)
    for _ in range(2):
        steps.loss(batches)
    assert max(most) == 2


def test_the_loss_over_the_vocabulary_comes_in_pieces(case, monkeypatch):
    model, batches, expected, loss = case
    monkeypatch.setitem(PIECES, "cpu", 3 * model.config.vocab_size)
    most, inner = [], Head._logits
    monkeypatch.setattr(Head, "_logits", lambda *args: (most.append(args[2].shape[1]), inner(*args))[1])
    lora, steps = exact(model, get_peft_model_state_dict(expected))
    assert torch.allclose(steps.loss(batches), loss, rtol=1e-6)
    assert max(most) == 3
    assert sum(most) == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for name, gradient in gradients(expected).items():
        assert torch.allclose(gradients(lora)[name], gradient, rtol=1e-4, atol=1e-6), name


def test_a_weight_may_be_read_when_its_unit_has_run(case):
    model, batches, expected, _ = case
    lora, steps = exact(model, get_peft_model_state_dict(expected))
    backbone = steps.model.model
    backbone.layers[0].register_forward_pre_hook(
        lambda _, args: (args[0] + 0 * backbone.embed_tokens.weight[0], *args[1:])
    )
    steps.loss(batches)
    require_equal(lora, expected)
    assert all(parameter.is_meta for parameter in steps.model.parameters() if not parameter.requires_grad)


def test_a_head_may_ask_how_many_positions_there_are(case, monkeypatch):
    model, batches, expected, loss = case
    lora, steps = exact(model, get_peft_model_state_dict(expected))
    own = type(steps.model).forward

    def asking(self, input_ids=None, inputs_embeds=None, **options):
        assert (inputs_embeds if input_ids is None else input_ids).shape[1] > 0
        return own(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **options)

    monkeypatch.setattr(type(steps.model), "forward", asking)
    assert torch.allclose(steps.loss(batches), loss, rtol=1e-6)
    require_equal(lora, expected)


def test_global_randomness_advances_by_one_draw(case):
    model, batches, expected, _ = case
    _, steps = exact(model, get_peft_model_state_dict(expected), dropout=0.5)
    seeds_of(4)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    steps.loss(batches)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_base_that_changes_meanwhile_is_refused(case, tmp_path):
    model, batches, expected, _ = case
    copied = TinyModel(model.declared, model.settings, "copy", tmp_path)
    _, steps = exact(copied, get_peft_model_state_dict(expected))
    steps.loss(batches)
    os.utime(copied.base.directory / "model.safetensors", ns=(1, 1))
    with pytest.raises(EmlocError, match="has changed since it was first read"):
        steps.loss(batches)


def test_a_block_that_runs_twice_or_writes_to_a_buffer_is_refused(case, monkeypatch):
    model, batches, expected, _ = case
    lora, steps = exact(model, get_peft_model_state_dict(expected))
    layers = lora.get_base_model().model.layers
    layers[1].register_buffer("seen", torch.zeros(()), persistent=False)
    layers[1].register_forward_hook(lambda *_: None)
    monkeypatch.setattr(layers[1].mlp, "forward", counting(layers[1], layers[1].mlp.forward))
    with pytest.raises(EmlocError, match=r"model\.layers\.1 writes to a buffer"):
        steps.loss(batches)
    lora, steps = exact(model, get_peft_model_state_dict(expected))
    layers = lora.get_base_model().model.layers
    layers.register_module("2", layers[1])
    with pytest.raises(EmlocError, match=r"model\.layers\.1 a second time"):
        steps.loss(batches)


def counting(block, forward):
    def count(*args):
        block.seen += 1
        return forward(*args)

    return count


def test_rows_without_anything_to_learn_are_refused(case):
    model, batches, expected, _ = case
    _, steps = exact(model, get_peft_model_state_dict(expected))
    with pytest.raises(EmlocError, match="No token"):
        steps.loss([{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches])
    partly = [batches[0], {**batches[1], "labels": torch.full_like(batches[1]["labels"], -100)}]
    assert torch.isfinite(steps.loss(partly))
