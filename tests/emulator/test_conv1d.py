"""GPT-2's Conv1D is a Linear to every stage, and stays a Conv1D to transformers and PEFT."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.jobs import compress_job, correct_job, merge_job
from support.marks import thorough
from support.models import save_tiny_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from emloc_core.family import TINY
from emloc_core.settings import CompressSettings, CorrectSettings
from emloc_core.standins.transposed import TransposedLinear, as_linears

IDS = torch.arange(5, 25)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2 of which every block has a square weight."""
    return save_tiny_model({"model_type": "gpt2", **TINY, "hidden_size": 64}, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module", params=["trellis", *thorough("low-rank", "nf4")])
def emulator(request, gpt2, rows_file, tmp_path_factory):
    settings = CompressSettings(kind=request.param, samples=4, selection=2)
    return compress_job(gpt2, rows_file, tmp_path_factory.mktemp("made") / "emulator", settings).run()


def test_as_linears_a_model_computes_the_same_on_the_same_weights(gpt2):
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    before, weight = logits(model), model.transformer.h[0].attn.c_attn.weight
    as_linears(model)
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    linear = model.transformer.h[0].attn.c_attn
    assert (type(linear), linear.weight.data_ptr()) == (TransposedLinear, weight.data_ptr())
    torch.testing.assert_close(logits(model), before)


def test_every_conv1d_of_a_block_has_a_stand_in_close_to_it(gpt2, emulator):
    base, model = (AutoModelForCausalLM.from_pretrained(path) for path in (gpt2, emulator))
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    wanted = logits(base)
    assert 0 < (logits(model) - wanted).norm() < 0.3 * wanted.norm()  # transposed wrongly, about 1


def test_made_dense_it_is_saved_as_gpt2(emulator, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(emulator)
    if not hasattr(model.transformer.h[0].attn.c_attn, "dense"):
        pytest.skip("bitsandbytes makes its own layers dense")
    before = logits(model)
    model.dequantize().save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), before)


def test_a_corrected_lora_loads_without_a_warning_and_is_merged(gpt2, emulator, tmp_path):
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(emulator), LoraConfig(target_modules=["c_attn", "c_proj", "c_fc"], r=2)
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter, corrected = tmp_path / "adapter", tmp_path / "corrected"
    correct_job(adapter, gpt2, corrected, CorrectSettings(clamp="none"), emulator=emulator).run()
    assert json.loads((corrected / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    merge_job(corrected, gpt2, tmp_path / "merged").run()
    with warnings.catch_warnings(action="error", category=UserWarning):
        applied = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), corrected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(applied), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(gpt2)), atol=1e-3)
