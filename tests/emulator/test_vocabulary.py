"""Output layer and embeddings in an emulator: packed where the Linears are, shared where they are tied."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from emloc_llama import LLAMA
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapters import delta
from support.jobs import compress_job, correct_job, merge_job, train_job
from support.marks import most_thorough
from support.models import save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from emloc_core.adapters.adapter import Adapter
from emloc_core.algorithms.statistics import Gram
from emloc_core.compat.trl import fuse_loss
from emloc_core.emulator import pack
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.manifest import read_manifest
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload
from emloc_core.settings import CompressSettings, CorrectSettings, TrainSettings
from emloc_core.standins.vocabulary import PACKINGS, replace_vocabulary

IDS = torch.arange(3, 23)[None]
GEMMA = {
    "model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
}  # fmt: skip
MODELS = {"untied": LLAMA.tiny_configs[0], "tied, scaled": GEMMA}


@pytest.fixture(scope="module", params=MODELS)
def models(request, rows_file, tmp_path_factory):
    """A base, an emulator of it, and whether its embeddings are tied."""
    directory = tmp_path_factory.mktemp("models")
    base = save_tiny_model(MODELS[request.param], directory / "base")
    settings = CompressSettings(kind="trellis", samples=4, selection=2)
    return base, compress_job(base, rows_file, directory / "emulator", settings).run(), request.param != "untied"


def dense(model):
    """The same model with ordinary layers in place of the vocabulary's packed ones."""
    dense_model = copy.deepcopy(model)
    weights = {path: model.get_submodule(path).weight[:] for path in ("model.embed_tokens", "lm_head")}
    for path, weight in weights.items():
        layer = dense_model.get_submodule(path).dense()
        assert torch.equal(layer.weight, weight)
        dense_model.set_submodule(path, layer)
    return dense_model


def test_a_loaded_emulator_computes_with_the_unpacked_rows(models):
    base, emulator, tied = models
    model = AutoModelForCausalLM.from_pretrained(emulator).eval()
    assert model.config.quantization_config.vocabulary.keys() == {"model.embed_tokens", "lm_head"}
    assert (model.lm_head.codes is model.model.embed_tokens.codes) == tied
    actual, expected = model(IDS), dense(model)(IDS)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    original = AutoModelForCausalLM.from_pretrained(base)
    weight = original.model.embed_tokens.weight
    assert all(torch.equal(model.lm_head.weight[word], model.lm_head.weight[:][word]) for word in (3, -1))
    assert (model.model.embed_tokens.weight[:] - weight).norm() < 0.01 * weight.norm()
    assert isinstance(model.model.embed_tokens, type(original.model.embed_tokens))  # which may scale what is looked up


@pytest.mark.parametrize("calibration", most_thorough(["propagated", "base"], "propagated"))
def test_an_output_layer_is_fitted_to_what_it_is_given(calibration, rows_file, tmp_path):
    base = save_tiny_model(MODELS["untied"], tmp_path / "base")
    settings = CompressSettings(kind="trellis", samples=40, selection=2, calibration=calibration)
    job = compress_job(base, rows_file, tmp_path / "emulator", settings)
    emulator = AutoModelForCausalLM.from_pretrained(job.run()).eval()
    plain, original = copy.deepcopy(emulator), AutoModelForCausalLM.from_pretrained(base).eval()
    for name, part in PACKINGS["4-bit"].pack(original.lm_head.weight).parts.items():
        getattr(plain.lm_head, name).data = part
    source = emulator if calibration == "propagated" else original
    lost = {"fitted": 0.0, "plain": 0.0}
    for sample in job.samples:
        inputs = sample.inputs("cpu")
        with torch.no_grad():
            expected, hidden = original(**inputs).logits, source.model(**inputs).last_hidden_state
            lost["fitted"] += float((emulator.lm_head(hidden) - expected).square().sum())
            lost["plain"] += float((plain.lm_head(hidden) - expected).square().sum())
    assert lost["fitted"] < 0.8 * lost["plain"]
    packed_matrices = read_manifest(tmp_path / "emulator")["result"]["vocabulary"]
    errors = {matrix["path"]: matrix["relative_error"] for matrix in packed_matrices}
    assert 0 < errors["model.embed_tokens"] < 0.01 < errors["lm_head"] < 0.1


def test_blocks_are_fitted_behind_packed_embeddings(rows_file, tmp_path, monkeypatch):
    base = save_tiny_model(MODELS["untied"], tmp_path / "base")
    packings = []

    def spoilt(_module, packing, parts):
        packings.append(packing)
        return SimpleNamespace(forward=lambda ids: torch.full((*ids.shape, parts["codes"].shape[1]), torch.nan))

    monkeypatch.setattr(pack, "packed_embedding", spoilt)
    with pytest.raises(EmlocError, match="NaN"):
        compress_job(base, rows_file, tmp_path / "emulator", CompressSettings(kind="trellis", samples=4)).run()
    assert packings == ["8-bit"]


def test_gradients_and_trls_loss_are_those_of_the_unpacked_rows(models):
    _, emulator, _ = models
    model = AutoModelForCausalLM.from_pretrained(emulator).eval()
    grown, losses = [], []
    for variant in (model, dense(model)):
        inputs = variant.get_input_embeddings()(IDS).detach().requires_grad_()
        fuse_loss(variant)
        variant(inputs_embeds=inputs).logits.logsumexp(-1).sum().backward()
        grown.append(inputs.grad)
        losses.append(variant(input_ids=IDS, labels=IDS, fused_lm_head=True).loss)
    torch.testing.assert_close(*grown)
    torch.testing.assert_close(*losses)


def test_what_is_loaded_can_be_saved_and_made_dense(models, tmp_path):
    _, emulator, tied = models
    model = AutoModelForCausalLM.from_pretrained(emulator).eval()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (again.lm_head.codes is again.model.embed_tokens.codes) == tied
    again.dequantize()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert type(again.lm_head) is nn.Linear
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("models", most_thorough(MODELS, "tied, scaled"), indirect=True)
def test_an_emulator_takes_the_bytes_that_are_planned(models):
    base, emulator, _ = models
    planned = MemoryModel(base / "config.json", Workload(1, 16), CompressSettings(kind="trellis"))
    assert planned.emulator_bytes(planned.plan()) == Checkpoint(emulator).nbytes
    kept = MemoryModel(base / "config.json", Workload(1, 16), CompressSettings(kind="trellis", keep="head"))
    assert kept.emulator_bytes(kept.plan()) > Checkpoint(emulator).nbytes
    (step,) = [planned.tuning(planned.plan())]
    assert step.terms["weights"] == pytest.approx(Checkpoint(emulator).nbytes, abs=4096)


def test_a_lora_on_the_output_layer_is_corrected_for_its_weight(models, tmp_path):
    """Without a clamp, what base and LoRA make of inputs that the LoRA sees is what the emulator and its LoRA did."""
    base, emulator, _ = models
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(emulator)
    tuned = get_peft_model(model, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    layer = tuned.get_base_model().lm_head
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    tuned(IDS, labels=IDS).loss.backward()
    assert layer.lora_A["default"].weight.grad.abs().max() > 0
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    corrected = correct_job(tmp_path / "adapter", base, tmp_path / "corrected", CorrectSettings(clamp="none")).run()
    original = AutoModelForCausalLM.from_pretrained(base)
    weight, seen = original.lm_head.weight.detach(), Adapter(tmp_path / "adapter").loras["lm_head"].a.T
    expected = (model.lm_head.base_layer.weight[:] + delta(Adapter(tmp_path / "adapter").loras["lm_head"])) @ seen
    corrected_weight = weight + delta(Adapter(corrected).loras["lm_head"])
    torch.testing.assert_close(corrected_weight @ seen, expected, rtol=1e-3, atol=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(merge_job(corrected, base, tmp_path / "merged").run())
    torch.testing.assert_close(merged.lm_head.weight.detach(), corrected_weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("models", most_thorough(MODELS, "tied, scaled"), indirect=True)
def test_it_is_trained_on_as_any_emulator_is(models, rows_file, tmp_path):
    base, emulator, _ = models
    settings = TrainSettings(steps=3, batch_size=4, learning_rate=0.01, bf16=False)
    adapter = train_job(emulator, rows_file, tmp_path / "adapter", settings).run()
    corrected = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings()).run()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), corrected)
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 9]}])
def test_packed_layers_are_not_trained_themselves(models, rows_file, tmp_path, settings):
    with pytest.raises(EmlocError, match="cannot be trained while packed; make the emulator with --keep head"):
        train_job(models[1], rows_file, tmp_path / "adapter", TrainSettings(**settings))
    with pytest.raises(EmlocError, match="cannot be trained while packed"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(models[1]), LoraConfig(target_modules="q_proj", **settings))


def test_an_emulator_in_four_bits_is_bitsandbytes_own_without_them(rows_file, tmp_path):
    wide = {**LLAMA.tiny_configs[0], "hidden_size": 64, "intermediate_size": 128}  # as its kernels want them
    base, emulators = save_tiny_model(wide, tmp_path / "base"), {}
    for keep in (None, "head"):
        settings = CompressSettings(kind="nf4", calibration="none", selection=2, keep=keep)
        emulators[keep] = compress_job(base, rows_file, tmp_path / str(keep), settings).run()
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in emulators.values()]
    assert [config["quant_method"] for config in configs] == ["emloc", "bitsandbytes"]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).eval() for path in emulators.values())
    for path, packing in configs[0]["vocabulary"].items():
        weight = theirs.get_submodule(path).weight
        packed = PACKINGS[packing].pack(weight)
        assert torch.equal(ours.get_submodule(path).codes, packed.parts["codes"])
    for part in ("lm_head", "model.embed_tokens"):
        ours.set_submodule(part, theirs.get_submodule(part))
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_rows_are_rounded_with_feedback():
    torch.manual_seed(0)
    weight, inputs = torch.randn(40, 96), torch.randn(500, 96) @ torch.randn(96, 96) * torch.logspace(0, -2, 96)
    gram = Gram("input", 96)
    gram.add(inputs)
    plain, fitted = (PACKINGS["4-bit"].pack(weight, gram_or_none) for gram_or_none in (None, gram))
    errors = []
    for packed in (plain, fitted):
        rows = PACKINGS["4-bit"].unpack(*packed.parts.values(), 96)
        errors.append(float(((rows - weight) @ inputs.T).norm() / (weight @ inputs.T).norm()))
    assert fitted.error == pytest.approx(errors[1], rel=1e-3)
    assert errors[1] < 0.7 * errors[0]


def test_anything_but_rows_is_refused(models):
    model = AutoModelForCausalLM.from_pretrained(models[1])
    with pytest.raises(EmlocError, match=r"aten.add.Tensor needs it as it is in the base"):
        model.lm_head.weight + 1
    with pytest.raises(EmlocError, match=r"neither a Linear nor embeddings at model.norm"):
        replace_vocabulary(model, {"model.norm": "8-bit"})
