"""The script in examples/ trains an emulator with stock libraries, and its adapter is carried over to the base."""

import runpy
import sys

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from support.jobs import compress_job, correct_job
from support.marks import thorough
from support.paths import EXAMPLES
from support.rows import example_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from emloc_core.adapters.adapter import Adapter
from emloc_core.data.rows import load_rows
from emloc_core.data.tokenize import encode
from emloc_core.settings import CompressSettings, CorrectSettings

SCRIPT = EXAMPLES / "train_with_your_own_script.py"
TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("trainer", ["sft", *thorough("plain")])
def test_it_trains_an_emulator_and_the_adapter_is_carried_over(
    trainer, tiny_emulator, tiny_model, rows_file, tmp_path, monkeypatch
):
    rows = write_jsonl(tmp_path / "rows.jsonl", example_rows()[:100])
    with rows.open("a", encoding="utf-8") as file:  # a line separator of Unicode's ends no row
        file.write('{"prompt": "animal: cat\u2028colour: red. sentence:", "completion": " a red cat runs."}\n')
    adapter = tmp_path / "adapter"
    argv = [SCRIPT, tiny_emulator.name, rows, adapter, "--trainer", trainer, "--steps", "20", "--learning-rate", "0.02"]
    monkeypatch.chdir(tiny_emulator.parent)
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert Adapter(adapter).config["base_model_name_or_path"] == str(tiny_emulator)

    loras = Adapter(adapter).loras  # the whitelist of what can be carried over passes it
    assert {path.rpartition(".")[2] for path in loras} == TARGETS
    assert len(loras) == 21
    corrected = correct_job(adapter, tiny_model, tmp_path / "corrected", CorrectSettings()).run()

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    held_out = load_rows(str(rows_file))[100:]
    before = nll(base, encode(held_out, tokenizer))
    after = nll(PeftModel.from_pretrained(base, corrected).eval(), encode(held_out, tokenizer))
    assert after < before - 0.1


def test_rewards_train_an_emulator_too(tiny_emulator, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_emulator.parent)
    rows = write_jsonl(tmp_path / "rows.jsonl", example_rows()[:40])
    argv = [
        SCRIPT,
        tiny_emulator.name,
        rows,
        tmp_path / "a",
        "--trainer",
        "grpo",
        "--steps",
        "2",
        "--learning-rate",
        "0.1",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    rewards = runpy.run_path(str(SCRIPT))["shares_of_words"]
    assert rewards([" a red cat", "no"], [" a red cat runs.", " a red cat runs."]) == [0.75, 0.0]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    loras = Adapter(tmp_path / "a").loras
    assert len(loras) == 21
    assert correct_job(tmp_path / "a", tiny_model, tmp_path / "c", CorrectSettings()).run()


@pytest.mark.parametrize("kind", ["nf4", *thorough("trellis"), "low-rank-nf4"])
def test_an_emulator_may_be_placed_by_a_map(kind, tiny_model, rows_file, tmp_path):
    """Here on one device; a block that waits on a disk stands for one on another GPU: accelerate's hooks bring both."""
    settings = CompressSettings(kind=kind, samples=6, selection=2)
    emulator = compress_job(tiny_model, rows_file, tmp_path / "emulator", settings).run()
    ids, gradients = torch.arange(3, 30)[None], []
    for placement in ({}, {"device_map": "auto"}):
        model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto", **placement)
        torch.manual_seed(0)
        lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in lora.parameters() if p.requires_grad)])
    assert len(gradients[0]) == 43
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    plain = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto").eval()
    devices = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "lm_head"), "cpu")
    devices |= {"model.layers.1": "disk", "model.rotary_emb": "cpu"}
    with torch.no_grad():
        logits = plain(input_ids=ids).logits
        placed = dispatch_model(plain, devices, main_device="cpu", offload_dir=str(tmp_path / "disk"), force_hooks=True)
        assert placed.model.layers[1].mlp.down_proj.weight.is_meta
        assert torch.equal(placed(input_ids=ids).logits, logits)


def nll(model, samples) -> float:
    """Mean over the rows of the completion's negative log-likelihood per token."""
    losses = []
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        labels = torch.where(torch.tensor([sample.completion_mask]) == 1, ids, -100)
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=labels).loss.item())
    return sum(losses) / len(losses)
