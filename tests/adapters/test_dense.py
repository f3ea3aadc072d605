"""Trained embeddings and output layers are carried over and merged."""

import json
from contextlib import nullcontext

import pytest
import torch
from emloc_llama import LLAMA
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.jobs import compress_job, correct_job, exact_job, merge_job, polish_job, train_job
from support.marks import most_thorough
from support.models import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_core.adapters.adapter import WEIGHTS, Adapter
from emloc_core.adapters.candidates import CANDIDATES
from emloc_core.errors import EmlocError
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload
from emloc_core.settings import CompressSettings, CorrectSettings, PolishSettings, TrainSettings

IDS = torch.arange(3, 23)[None]
WAYS = [
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"trainable_token_indices": [5, 9]},
]


#: What differs little where embeddings are tied is shown there.
TIED = pytest.mark.parametrize("models", most_thorough([False, True], True), ids=["untied", "tied"], indirect=True)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request, rows_file, tmp_path_factory):
    """A base with tied embeddings or not, and an emulator of it."""
    directory = tmp_path_factory.mktemp("models")
    base = save_tiny_model({**LLAMA.tiny_configs[0], "tie_word_embeddings": request.param}, directory / "base")
    settings = CompressSettings(samples=4, selection=2, ratio=0.5)
    return base, compress_job(base, rows_file, directory / "emulator", settings).run()


def adapter_on(emulator, directory, **settings):
    """An adapter as PEFT writes it, with numbers in it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(emulator)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lora.save_pretrained(directory, save_embedding_layers=False)
    return directory


@pytest.mark.parametrize("options", most_thorough(WAYS, *WAYS[2:]), ids=["embeddings", "output", "both", "tokens"])
def test_they_are_carried_over_and_merged(models, tmp_path, options):
    base, emulator = models
    adapter = adapter_on(emulator, tmp_path / "adapter", **options)
    corrected = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp=1)).run()
    trained, kept = Adapter(adapter).others, Adapter(corrected).others
    assert trained.keys() == kept.keys()
    assert all(torch.equal(kept[key], tensor) for key, tensor in trained.items())

    merged = merge_job(corrected, base, tmp_path / "merged").run()
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), corrected).eval()
    with torch.no_grad():
        expected = with_adapter(IDS).logits
        actual = AutoModelForCausalLM.from_pretrained(merged).eval()(IDS).logits
        before = AutoModelForCausalLM.from_pretrained(base).eval()(IDS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (actual - before).abs().max() > 0.01


@TIED
def test_candidates_are_compared_with_them(models, tmp_path):
    """Otherwise a base that lacks what was trained would be judged."""
    base, emulator = models
    adapter = adapter_on(emulator, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    job = correct_job(adapter, base, tmp_path / "a", CorrectSettings())
    loras, losses = job._compare(CANDIDATES[:1], lambda *_: None)
    uncorrected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    layers = uncorrected.get_base_model()
    for path, (lora, *_) in loras.items():
        module = layers.get_submodule(path)
        module.lora_A["default"].weight.data, module.lora_B["default"].weight.data = lora.a, lora.b
        module.scaling["default"] = lora.scale
    for sample, (loss, count) in zip(job.samples, losses[0].tolist(), strict=True):
        ids = torch.tensor([sample.input_ids])
        mask = torch.tensor(sample.completion_mask[1:], dtype=torch.bool)
        with torch.no_grad():
            logits = uncorrected(ids).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        assert loss == pytest.approx(float(nll[mask].sum()), rel=1e-4)
        assert count == int(mask.sum())


@TIED
def test_training_trains_saves_and_resumes_them(models, rows_file, tmp_path):
    base, emulator = models
    settings = TrainSettings(
        steps=2, batch_size=4, learning_rate=0.05, bf16=False, modules_to_save="lm_head", layers_to_transform="1",
        rank_pattern="q_proj=2", target_modules="q_proj,v_proj",
    )  # fmt: skip
    adapter = Adapter(train_job(emulator, rows_file, tmp_path / "adapter", settings).run())
    assert {path: len(lora.a) for path, lora in adapter.loras.items()} == {
        "model.layers.1.self_attn.q_proj": 2, "model.layers.1.self_attn.v_proj": 8,
    }  # fmt: skip
    (new,) = adapter.replaced.values()
    old = AutoModelForCausalLM.from_pretrained(base).lm_head.weight
    assert (new.weight - old).abs().max() > 0.01
    merge_job(adapter, base, tmp_path / "merged", allow_uncorrected=True).run()
    with pytest.raises(EmlocError, match="Exact steps train only LoRAs, but lm_head"):
        polish_job(adapter, base, rows_file, tmp_path / "polished", PolishSettings(steps=1))
    with pytest.raises(EmlocError, match="Exact steps train only LoRAs"):
        exact_job(base, rows_file, tmp_path / "exact", settings)


@TIED
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"k_proj": 4}}, "no LoRA is on 'k_proj'"),
        ({"layers_to_transform": [0, 99]}, "no layer 99"),
        ({"modules_to_save": ["head"]}, "no module 'head'"),
        ({"modules_to_save": ["v_proj"]}, "v_proj differs between the emulator and the base"),
    ],
)
def test_what_matches_nothing_is_refused_before_training(models, rows_file, tmp_path, settings, message):
    with pytest.raises(EmlocError, match=message):
        train_job(models[1], rows_file, tmp_path / "a", TrainSettings(target_modules="q_proj", **settings))


@TIED
def test_one_matrix_is_not_trained_in_two_ways(models, rows_file, tmp_path):
    base, emulator = models
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings
    for name, refused in (("embed_tokens", True), ("lm_head", tied)):
        settings = {"modules_to_save": [name], "trainable_token_indices": [5]}
        with pytest.raises(EmlocError, match="one matrix, as tied") if refused else nullcontext():
            train_job(emulator, rows_file, tmp_path / "a", TrainSettings(target_modules="q_proj", **settings))
        with pytest.raises(EmlocError, match="one matrix, as tied") if refused else nullcontext():
            adapter_on(emulator, tmp_path / name, **settings)


def _with(**tensors):
    return lambda weights: weights | {f"base_model.model.{path}.weight": tensor for path, tensor in tensors.items()}


def _rows(cut):
    return lambda weights: {
        key: tensor[cut].contiguous() if "token" in key else tensor for key, tensor in weights.items()
    }


@TIED
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(**{"model.norm": torch.ones(8)}), "norm.weight, which is neither"),
        (_with(**{"model.layers.0.mlp.up_proj": torch.ones(2, 2)}), "replaces model.layers.0.mlp.up_proj"),
        (_rows(slice(1)), "neither"),
        (_rows((slice(None), slice(3))), "does not fit"),
    ],
)
def test_what_the_config_does_not_say_is_refused(models, tmp_path, change, message):
    base, emulator = models
    adapter = adapter_on(emulator, tmp_path / "adapter", trainable_token_indices=[5, 9])
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    with pytest.raises(EmlocError, match=message):
        correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp=1))


def test_tokens_beyond_the_vocabulary_are_refused(models, tmp_path):
    base, emulator = models
    adapter = adapter_on(emulator, tmp_path / "adapter", trainable_token_indices=[5, 9])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": [5, 10**6]}))
    with pytest.raises(EmlocError, match="does not fit"):
        merge_job(adapter, base, tmp_path / "merged")


@TIED
def test_the_plan_counts_what_is_trained(models):
    file = models[0] / "config.json"

    def planned(**settings):
        train = TrainSettings(**settings)
        return MemoryModel(file, Workload(batch_size=1, length=16, train=train)).tuning().terms["adapter"]

    config = json.loads(file.read_text())
    head = 4 * config["vocab_size"] * config["hidden_size"]  # fp32
    assert planned(modules_to_save=["lm_head"]) == planned() + head
    assert planned(rank_pattern={"q_proj": 16}) > planned()
    assert planned(layers_to_transform=[2]) == planned()  # every layer is planned like those that are traced
