"""Baselines of ``benchmarks/quality.py``: a smaller stand-in with a LoRA is the base with zeros for what it lacks."""

import pytest
import quality_baselines as baselines
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapters import make_adapter
from support.models import save_tiny_model
from support.rows import example_rows, write_jsonl
from transformers import AutoModelForCausalLM

from emloc_core.adapters.moments import FILE
from emloc_core.family import TINY
from emloc_core.files.shards import write_shard

IDS = torch.arange(24)[None] % 120
SIZES = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base"
    return save_tiny_model({"model_type": "llama", **TINY, **SIZES, "num_hidden_layers": 4}, path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", example_rows()[:8])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["depth", "pruned"])
def test_with_all_of_the_memory_it_is_the_base(name, base, rows, tmp_path):
    baseline = baselines.make(name, 1.0, base, rows, tmp_path / "whole")
    assert baseline.share == 1
    rounded = loaded(base).to(torch.bfloat16).float()  # as it is written
    torch.testing.assert_close(logits(loaded(tmp_path / "whole")), logits(rounded))


@pytest.mark.parametrize("name", ["depth", "pruned"])
def test_a_lora_is_carried_to_where_its_weights_are_in_the_base(name, base, rows, tmp_path):
    baseline = baselines.make(name, 0.5, base, rows, tmp_path / "half")
    assert 0.4 < baseline.share <= 0.55
    adapter = make_adapter(tmp_path / "half", tmp_path / "adapter")
    write_shard(adapter / FILE, load_file(adapter / "adapter_model.safetensors"))
    carried = baselines.on_the_base(adapter, baseline, base, tmp_path / "carried")
    widened = [load_file(carried / name) for name in ("adapter_model.safetensors", FILE)]
    assert widened[0].keys() == widened[1].keys()
    assert all(torch.equal(widened[0][key], widened[1][key]) for key in widened[0])
    model = loaded(base).to(torch.bfloat16).float()
    for index, layer in enumerate(model.model.layers):
        for module, linear in ((layer.self_attn.o_proj, "o_proj"), (layer.mlp.down_proj, "down_proj")):
            if index not in baseline.blocks:
                module.weight.data.zero_()
            elif linear in baseline.inputs:
                lacking = torch.ones(module.in_features, dtype=torch.bool)
                lacking[baseline.inputs[linear][index]] = False
                assert lacking.any()
                module.weight.data[:, lacking] = 0
    expected = logits(PeftModel.from_pretrained(loaded(tmp_path / "half"), adapter))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, carried)), expected)
    assert not torch.allclose(expected, logits(loaded(tmp_path / "half")))


def test_in_four_bits_more_is_kept_in_the_same_memory(base, rows, tmp_path):
    unpacked, packed = (baselines.make(name, 0.15, base, rows, tmp_path / name) for name in ("pruned", "pruned-nf4"))
    assert len(packed.inputs["down_proj"][0]) > len(unpacked.inputs["down_proj"][0])
    assert packed.share == pytest.approx(0.15, abs=0.02)
