"""Merging equals PEFT's, shard by shard, and leaves everything else as it was."""

import json
import shutil

import pytest
import torch
from emloc_llama import LLAMA
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import TARGETS, delta, make_adapter
from support.jobs import correct_job, merge_job
from support.marks import thorough
from support.rows import example_rows, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import emloc_core
from emloc_core.adapters import merge as merging
from emloc_core.adapters.adapter import Adapter, fingerprint
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.header import read_header
from emloc_core.files.inputs import Inputs
from emloc_core.settings import CorrectSettings


def merge(adapter, base, output, **options):
    return merge_job(adapter, base, output, **options).run()


def peft_merged(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    return model.merge_and_unload().eval()


@pytest.mark.parametrize("options", [{"alpha_pattern": {"up_proj": 1}}, *thorough({}, {"use_rslora": True})])
@pytest.mark.parametrize("rows_bytes", [1000, merging._ROWS_BYTES])
def test_equals_merge_and_unload(tiny_model, tmp_path, monkeypatch, rows_bytes, options):
    monkeypatch.setattr(merging, "_ROWS_BYTES", rows_bytes)
    adapter = make_adapter(tiny_model, tmp_path / "adapter", **options)
    merged = merge(adapter, tiny_model, tmp_path / "merged")
    expected = peft_merged(tiny_model, adapter).state_dict()
    actual = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").state_dict()
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(actual[key], tensor, atol=1e-6), key


def test_untouched_tensors_keep_their_bytes_and_their_place(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    merged = merge(adapter, tiny_model, tmp_path / "merged")
    before, after = (load_file(directory / "model.safetensors") for directory in (tiny_model, merged))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"model.layers.{index}.self_attn.q_proj.weight" for index in range(3)}
    assert list(read_header(merged / "model.safetensors")[0]) == list(read_header(tiny_model / "model.safetensors")[0])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (merged / name).read_bytes() == (tiny_model / name).read_bytes()
    AutoTokenizer.from_pretrained(merged)


def test_a_sharded_half_precision_checkpoint_keeps_shards_and_dtype(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="40kB")
    base = Checkpoint(tmp_path / "base")
    assert len(base.shards) > 1
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", size=0.2)
    merged = merge(adapter, tmp_path / "base", tmp_path / "merged")
    assert [shard.name for shard in Checkpoint(merged).shards] == [shard.name for shard in base.shards]
    expected = peft_merged(tmp_path / "base", adapter).state_dict()
    actual = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").state_dict()
    for key, tensor in expected.items():
        assert actual[key].dtype == torch.bfloat16
        assert torch.allclose(actual[key].float(), tensor.float(), atol=0.02, rtol=0.01), key


@pytest.mark.parametrize(("dtype", "value", "size"), [("float16", 65504, 9e3), ("float32", float("nan"), 0.05)])
def test_a_weight_that_is_no_number_or_does_not_fit_its_dtype_is_refused(tiny_model, tmp_path, dtype, value, size):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype))
    model.model.layers[1].mlp.up_proj.weight.data[3] = value
    model.save_pretrained(tmp_path / "base", max_shard_size="40kB")  # the other shards are written beside it
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["up_proj"], size=size)
    with pytest.raises(EmlocError, match=r"merged model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        merge(adapter, tmp_path / "base", tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def tied_base(tmp_path):
    options = dict(LLAMA.tiny_configs[0]) | {"tie_word_embeddings": True}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_tied_embeddings_stay_tied(tmp_path):
    base = tied_base(tmp_path)
    merged = merge(make_adapter(base, tmp_path / "adapter"), base, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in Checkpoint(merged).tensors


def test_a_lora_on_a_tied_head_changes_the_head_alone(tmp_path):
    base = tied_base(tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head"], size=0.3)
    merged = AutoModelForCausalLM.from_pretrained(merge(adapter, base, tmp_path / "merged"), dtype="auto").eval()
    original = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter).eval()
    ids = torch.tensor([[1, 9, 30, 44, 80]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, wrapped(ids).logits, atol=1e-5)
        assert not torch.allclose(merged(ids).logits, original(ids).logits, atol=1e-2)
    assert torch.equal(merged.model.embed_tokens.weight, original.model.embed_tokens.weight)


def store_head(base):
    """Store a copy of a tied head in the base's file, too; return all of its tensors."""
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_takes_trained_rows_and_then_a_lora(tmp_path, stored):
    base = tied_base(tmp_path)
    if stored:
        store_head(base)
    options = {"target_modules": ["lm_head"], "trainable_token_indices": [5, 9], "size": 0.3}
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    merged = AutoModelForCausalLM.from_pretrained(merge(adapter, base, tmp_path / "merged"), dtype="auto").eval()
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter).eval()
    ids = torch.tensor([[1, 9, 30, 5, 80]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, wrapped(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_architecture_is_refused(tiny_model, tmp_path):
    options = dict(LLAMA.tiny_configs[0]) | {"hidden_size": 48}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    adapter = make_adapter(tmp_path / "wide", tmp_path / "adapter")
    with pytest.raises(EmlocError, match="is for a weight of shape"):
        merge(adapter, tiny_model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_stored_copy_of_a_tied_head_takes_the_update(tmp_path):
    base = tied_base(tmp_path)
    tensors = store_head(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head"], size=0.3)
    merged = merge(adapter, base, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    change = delta(Adapter(adapter).loras["lm_head"])
    assert torch.allclose(model.lm_head.weight, tensors["lm_head.weight"] + change, atol=1e-6)
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_a_quantised_base_is_refused(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(EmlocError, match="quantised"):
        merge(adapter, base, tmp_path / "merged")


def test_an_adapter_of_a_model_that_is_not_here_is_refused_unless_asked_for(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "moved/away"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(EmlocError) as caught:
        merge(adapter, tiny_model, tmp_path / "merged")
    assert caught.value.code == "missing"
    assert merge(adapter, tiny_model, tmp_path / "merged", allow_uncorrected=True).is_dir()


def test_an_adapter_of_another_model_that_is_here_is_refused_unless_asked_for(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    assert merge(adapter, other, tmp_path / "of-a-copy").is_dir()
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(EmlocError, match=f"was trained on {tiny_model}, and {other} is another model"):
        merge(adapter, other, tmp_path / "merged")
    assert merge(adapter, other, tmp_path / "merged", allow_uncorrected=True).is_dir()


def test_an_emulator_that_has_gone_is_not_mistaken_for_another_base(tiny_model, tiny_emulator, tmp_path):
    emulator = shutil.copytree(tiny_emulator, tmp_path / "emulator")
    rows = write_jsonl(tmp_path / "rows.jsonl", example_rows()[20:40])
    adapter = emloc_core.train(emulator, str(rows), tmp_path / "adapter", steps=1, bf16=False).path
    shutil.rmtree(emulator)
    with pytest.raises(EmlocError, match="which was not found, and not on") as caught:
        merge(adapter, tiny_model, tmp_path / "merged", allow_uncorrected=True)
    assert caught.value.code == "missing"


def test_an_uncorrected_adapter_of_another_base_is_refused_even_if_asked_for(tiny_model, tiny_emulator, tmp_path):
    adapter = make_adapter(tiny_emulator, tmp_path / "adapter")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(EmlocError, match="a base other than"):
        merge(adapter, other, tmp_path / "merged", allow_uncorrected=True)


def test_an_uncorrected_adapter_is_refused_unless_asked_for(tiny_model, tiny_emulator, tmp_path):
    adapter = make_adapter(tiny_emulator, tmp_path / "adapter")
    with pytest.raises(EmlocError, match="not corrected"):
        merge(adapter, tiny_model, tmp_path / "merged")
    merged = merge(adapter, tiny_model, tmp_path / "merged", allow_uncorrected=True)
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert len(TARGETS) * 3 == len(
        {key for key in Checkpoint(merged).tensors if key.rpartition(".")[0].rpartition(".")[2] in TARGETS}
    )


@pytest.mark.parametrize("dtype", [torch.int8, *thorough(torch.bool, torch.uint16)])
def test_a_weight_that_holds_no_floats_is_refused(tiny_model, tmp_path, dtype):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=["up_proj"])
    base = shutil.copytree(tiny_model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, key: torch.ones(tensors[key].shape).to(dtype)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(EmlocError, match="is a weight of dtype"):
        merge(adapter, base, tmp_path / "merged", allow_uncorrected=True)
    assert not (tmp_path / "merged").exists()


def double_weights(adapter):
    weights = adapter / "adapter_model.safetensors"
    save_file({key: 2 * half for key, half in load_file(weights).items()}, weights)


def double_scale(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))


@pytest.fixture
def corrected(tiny_model, tiny_emulator, tmp_path):
    trained = make_adapter(tiny_emulator, tmp_path / "adapter")
    settings = CorrectSettings(clamp=1)
    return correct_job(trained, tiny_model, tmp_path / "corrected", settings).run()


@pytest.mark.parametrize("edit", [double_weights, double_scale])
def test_a_corrected_adapter_that_was_edited_is_refused(corrected, tiny_model, tmp_path, edit):
    edit(corrected)
    with pytest.raises(EmlocError):
        fingerprint(corrected, Inputs())
    with pytest.raises(EmlocError) as caught:
        merge(corrected, tiny_model, tmp_path / "merged")
    assert caught.value.code == "damaged"
    assert not (tmp_path / "merged").exists()


def test_an_adapter_may_be_told_where_its_model_is_now(corrected, tiny_model, tmp_path):
    config = json.loads((corrected / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (corrected / "adapter_config.json").write_text(json.dumps(config))
    assert merge(corrected, tiny_model, tmp_path / "merged").is_dir()


@pytest.mark.parametrize("name", ["model-00001-of-00004.safetensors", "tokenizer_config.json", "calibration.jsonl"])
def test_an_emulator_that_was_edited_is_refused(tiny_model, tiny_emulator, tmp_path, name):
    emulator = shutil.copytree(tiny_emulator, tmp_path / "emulator")
    adapter = make_adapter(emulator, tmp_path / "adapter")
    content = (emulator / name).read_bytes()
    (emulator / name).write_bytes(content.replace(b"a", b"b") if name[-1] != "s" else content[:-1] + b"\1")
    with pytest.raises(EmlocError) as caught:
        correct_job(adapter, tiny_model, tmp_path / "corrected", CorrectSettings(clamp=1)).run()
    assert caught.value.code == "damaged"
