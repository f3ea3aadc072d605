"""A base whose experts are published in MXFP4: read as the model that transformers unpacks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.jobs import compress_job, correct_job, merge_job, polish_job, train_job
from support.marks import most_thorough
from support.models import save_tiny_model
from transformers import AutoModelForCausalLM, Mxfp4Config

from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload
from emloc_core.model.opened import open_model
from emloc_core.settings import CompressSettings, CorrectSettings, PolishSettings, TrainSettings
from emloc_core.standins.expert_loras import expert_stacks

TINY = {
    "model_type": "gpt_oss", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
    "num_experts_per_tok": 2, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.arange(5, 40)[None]
LORA = {"batch_size": 2, "bf16": False, "logging_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny gpt-oss in MXFP4: any codes, and exponents that make weights of ordinary sizes."""
    directory = save_tiny_model(TINY, tmp_path_factory.mktemp("models") / "mxfp4")
    tensors = load_file(directory / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, n, m = tensors.pop(key).shape
        shape = (experts, m, n // 32)
        tensors[f"{key}_blocks"] = torch.randint(256, (*shape, 16), generator=draw, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(120, 125, shape, generator=draw, dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def unpacked_model(base):
    """The model as transformers unpacks it."""
    options = {"dtype": "auto", "quantization_config": Mxfp4Config(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(base, **options).eval()


def emulator_of(base, rows, output, kind="trellis", **settings):
    return compress_job(base, rows, output, CompressSettings(kind=kind, samples=12, selection=6, **settings))


def test_stacks_are_those_that_transformers_unpacks(base, unpacked_model):
    skeleton = open_model(str(base), "cpu").skeleton
    for path in expert_stacks(unpacked_model):
        with skeleton.parameters([path]) as tensors:
            assert torch.equal(tensors[path], unpacked_model.get_parameter(path))
        assert skeleton.model.get_parameter(path).is_meta
    assert float(unpacked_model.get_parameter(path).abs().max()) > 0


@pytest.mark.parametrize("kind", most_thorough(["nf4", "trellis", "low-rank"], "trellis", "low-rank"))
def test_an_emulator_of_it_is_made_and_as_large_as_said(base, unpacked_model, rows_file, tmp_path, kind):
    job = emulator_of(base, rows_file, tmp_path / "emulator", kind, **({"ratio": 0.6} if kind == "low-rank" else {}))
    emulator = job.run()
    assert job.describe()["emulator_bytes"] == Checkpoint(emulator).nbytes
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto").eval()
    with torch.no_grad():
        logits, expected = model(IDS).logits, unpacked_model(IDS).logits
    assert 1e-4 < float((logits - expected).norm() / expected.norm()) < 1.5


@pytest.mark.parametrize("on_experts", [False, True])
def test_a_lora_comes_back_to_it(base, rows_file, tmp_path, on_experts):
    emulator = emulator_of(base, rows_file, tmp_path / "emulator").run()
    train = TrainSettings(**LORA, steps=2, learning_rate=1e-2, lora_experts=on_experts)
    adapter = train_job(emulator, rows_file, tmp_path / "adapter", train).run()
    corrected = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp="auto")).run()
    polish_job(corrected, base, rows_file, tmp_path / "polished", PolishSettings(**LORA, steps=1)).run()
    if on_experts:
        with pytest.raises(EmlocError, match="if this is it, save it with save_pretrained"):
            merge_job(corrected, base, tmp_path / "merged")
        return
    merged = merge_job(corrected, base, tmp_path / "merged").run()
    before, after = (load_file(directory / "model.safetensors") for directory in (base, merged))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(".self_attn." in key for key in changed)
    assert Checkpoint(merged).config["quantization_config"] == Checkpoint(base).config["quantization_config"]


def test_its_memory_is_planned_as_that_of_the_model_in_bf16(base, unpacked_model, tmp_path):
    plain = json.loads((base / "config.json").read_text())
    del plain["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    plans = [MemoryModel(directory / "config.json", Workload(1, 32)) for directory in (base, tmp_path)]
    assert plans[0].parameters() == sum(parameter.numel() for parameter in unpacked_model.parameters())
    assert plans[0].tuning(plans[0].plan()).terms == plans[1].tuning(plans[1].plan()).terms


def test_what_is_missing_of_a_stack_is_found(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    path = "model.layers.0.mlp.experts.down_proj"
    del tensors[f"{path}_scales"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    skeleton = open_model(str(tmp_path / "base"), "cpu").skeleton
    with pytest.raises(EmlocError, match=r"down_proj cannot be made .*scales is missing"):
        skeleton.load_parameters([path])


def test_experts_that_would_stay_packed_are_refused(base, rows_file, tmp_path):
    """An emulator's files hold what is dense as the base's do."""
    with pytest.raises(EmlocError, match="in MXFP4, and would stay so"):
        emulator_of(base, rows_file, tmp_path / "emulator", "low-rank", ratio=0.6, allocator="global")


def test_other_ways_to_quantise_are_refused_as_ever(base, rows_file, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EmlocError, match="method 'gptq'"):
        emulator_of(tmp_path / "base", rows_file, tmp_path / "emulator")
