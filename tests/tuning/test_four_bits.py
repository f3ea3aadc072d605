"""A LoRA on a base in four bits, as bitsandbytes packs it: trained there, merged into the original."""

import shutil

import pytest
import torch
from emloc_llama import LLAMA
from support.evaluation import metrics_of
from support.jobs import merge_job, polish_job, train_job
from support.models import save_in_four_bits, save_tiny_model
from support.planned import workload
from transformers import AutoModelForCausalLM

from emloc_core import plan
from emloc_core.adapters.adapter import Adapter
from emloc_core.errors import EmlocError
from emloc_core.evaluation.new_task import write_task
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.documents import read_json, write_json
from emloc_core.memory.model import MemoryModel
from emloc_core.requests import CorrectRequest
from emloc_core.settings import CompressSettings, PolishSettings, TrainSettings
from emloc_core.stages.perform import prepare


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    # Kernels of bitsandbytes take 64 columns.
    wide = LLAMA.tiny_configs[0] | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128}
    return save_tiny_model(wide, tmp_path_factory.mktemp("original") / "base")


@pytest.fixture(scope="module")
def packed(original, tmp_path_factory):
    """The original as bitsandbytes packs it; nothing in it names the original."""
    return save_in_four_bits(original, tmp_path_factory.mktemp("four_bits") / "packed")


@pytest.fixture(scope="module")
def adapter(packed, rows_file, tmp_path_factory):
    """A LoRA on the packed model."""
    directory = tmp_path_factory.mktemp("adapter")
    settings = TrainSettings(steps=2, batch_size=4, learning_rate=0.01)
    return Adapter(train_job(packed, rows_file, directory / "adapter", settings).run())


def test_it_is_merged_into_the_original_that_is_named(adapter, original, tmp_path):
    with pytest.raises(EmlocError, match=r"is already quantised.*Give the original, unquantised model with --base"):
        merge_job(adapter, adapter.base_name, tmp_path / "merged")
    merged = merge_job(adapter, original, tmp_path / "merged").run()
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (original, merged))
    for path, lora in adapter.loras.items():
        change = lora.scale * lora.b.float() @ lora.a.float()
        torch.testing.assert_close(after[f"{path}.weight"] - before[f"{path}.weight"], change, atol=1e-6, rtol=1e-4)


def test_the_model_that_it_was_trained_on_may_be_in_the_cache_of_the_hub(
    adapter, packed, original, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub, copy = (tmp_path / "hub" / "models--some--packed", shutil.copytree(adapter.directory, tmp_path / "adapter"))
    write_json(copy / "adapter_config.json", adapter.config | {"base_model_name_or_path": "some/packed"})
    with pytest.raises(EmlocError, match="was trained on some/packed, which was not found"):
        merge_job(copy, original, tmp_path / "merged").run()
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("c" * 40)
    shutil.copytree(packed, hub / "snapshots" / ("c" * 40))
    assert merge_job(copy, original, tmp_path / "merged").run()


def test_another_model_is_not_its_original(adapter, original, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(original)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "other")
    job = merge_job(adapter, tmp_path / "other", tmp_path / "merged")
    with pytest.raises(EmlocError, match="made for a base other"):
        job.run()


@pytest.mark.parametrize("in_four_bits", [True, False])
def test_exact_steps_follow_on_either(adapter, original, rows_file, tmp_path, in_four_bits):
    base = Checkpoint(adapter.base_name if in_four_bits else original)
    polished = Adapter(polish_job(adapter, base, rows_file, tmp_path / "a", PolishSettings(steps=1)).run())
    assert polished.loras.keys() == adapter.loras.keys()
    if not in_four_bits:
        merge_job(polished, base, tmp_path / "merged").run()


@pytest.mark.parametrize("named", [False, True])
def test_there_is_nothing_to_correct_which_is_said(adapter, original, tmp_path, named):
    """The copy is for the base that is named, and can be merged into it."""
    base = {"base": str(original)} if named else {}
    job = prepare(CorrectRequest(adapter=adapter.directory, output=tmp_path / "corrected", **base))
    assert any("not an emulator: the LoRA stays as it is" in warning for warning in job.warnings)
    corrected = Adapter(job.run())
    assert corrected.is_corrected
    assert corrected.model_name == (str(original) if named else adapter.model_name)
    assert all(torch.equal(lora.a, adapter.loras[path].a) for path, lora in corrected.loras.items())
    if named:
        merge_job(corrected, original, tmp_path / "merged").run()


def test_its_lora_needs_what_one_on_an_emulator_in_four_bits_does(original, packed):
    model = MemoryModel(packed / "config.json", workload())
    emulator = MemoryModel(original / "config.json", workload(), CompressSettings(kind="nf4", keep="head"))
    assert model.tuning().terms == emulator.tuning(emulator.plan()).terms
    assert model.nbytes == emulator.emulator_bytes(emulator.plan()) < emulator.nbytes
    # On disk bitsandbytes also describes every packed weight in JSON.
    stored = sum(tensor.nbytes for key, tensor in Checkpoint(packed).tensors.items() if "bitsandbytes__" not in key)
    assert model.nbytes == stored


def test_the_plan_is_a_lora_on_it_as_it_is(packed, emloc):
    code, out, err = emloc("plan", packed, "--memory", "4GiB", "--device", "cpu", "--no-measure")
    assert code == 0, err
    assert "in four bits and float32" in out
    assert f"emloc train {packed}" in out
    ways = [way.name for way in plan(packed, memory="4GiB", device="cpu").decision.ways]
    assert ways == ["LoRA on the base", "exact steps"]


@pytest.mark.thorough
def test_too_little_memory_is_told_what_fits(packed, emloc):
    shorter = {"length": 64, "batch_size": 1, "accumulation": 8, "objective": "dpo"}
    needed = plan(packed, device="cpu", **shorter).decision.ways[0].bytes
    code, _, err = emloc("plan", packed, "--memory", needed, "--headroom", 0, "--device", "cpu", "--objective", "dpo")
    assert code == 1
    assert "tuning a LoRA on the model on 1 x 256 tokens needs" in err
    assert "1 x 64 tokens fits (" in err


@pytest.mark.parametrize("more", [("--kind", "nf4"), ("--ratio", 0.5)])
def test_no_emulator_is_made_of_it(more, packed, emloc):
    code, _, err = emloc("plan", packed, *more)
    assert code == 1
    assert "emulators are made from originals" in err


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "are NF4 with double quantisation; this one has"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "quantised, and not in four bits"),
    ],
)
def test_other_quantised_models_are_not_planned(settings, reason, packed, tmp_path):
    config = read_json(packed / "config.json")
    config["quantization_config"] |= settings
    write_json(tmp_path / "config.json", config)
    with pytest.raises(EmlocError, match=reason):
        plan(tmp_path)


@pytest.mark.usefixtures("calls_here")
def test_it_is_tuned_and_answers(packed, rows_file, tmp_path, emloc):
    command = ("tune", packed, "--data", rows_file, "--memory", "4GiB", "--steps", 1, "-o", tmp_path / "tuned")
    code, _, err = emloc(*command, "--merge")
    assert code == 1
    assert "a LoRA can only be merged into the original" in err
    assert not (tmp_path / "tuned").exists()
    code, _, err = emloc(*command)
    assert code == 0, err
    assert len(read_json(tmp_path / "tuned" / "answers.json")["answers"]) == 5


def test_it_is_evaluated(packed, adapter, rows_file, tmp_path):
    task = write_task("completion_nll", rows_file, tmp_path / "nll.yaml")
    alone, tuned = (metrics_of(packed, str(task), lora, limit=8)[0] for lora in (None, adapter.directory))
    assert tuned["metrics"]["nll"]["value"] != alone["metrics"]["nll"]["value"] > 0
