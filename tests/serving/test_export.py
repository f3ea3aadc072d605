"""Exports add what the adapter adds, in the plainest form; GGUF is read back by transformers, and by its own rule."""

import json
import shutil

import gguf
import numpy
import pytest
import torch
from emloc_llama import LLAMA
from emloc_qwen import QWEN
from peft import PeftModel
from support.adapters import contents, delta, make_adapter
from support.models import CHAT_TEMPLATE, save_tiny_model
from support.rows import example_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import emloc_core
from emloc_core.adapters.adapter import Adapter
from emloc_core.errors import EmlocError
from emloc_core.requests import make_request

ODD = {
    "r": 4,
    "use_rslora": True,
    "rank_pattern": {"layers.0.self_attn.q_proj": 6},
    "alpha_pattern": {"k_proj": 3},
}


def byte_level(model, target):
    """A copy of a model whose tokenizer is byte-level, as those of Llama 3, SmolLM and Qwen."""
    copy = shutil.copytree(model, target)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=special, show_progress=False)
    backend.train_from_iterator([row["prompt"] + row["completion"] for row in example_rows()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(copy)
    return copy


def loaded(model, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)


def test_an_adapter_of_many_ranks_and_scales_becomes_one_of_neither(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", **ODD)
    exported = emloc_core.export(adapter, tmp_path / "exported")
    config = json.loads((exported.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    before, after = Adapter(adapter).loras, Adapter(exported.path).loras
    assert before.keys() == after.keys()
    for path, lora in before.items():
        assert after[path].a.shape[0] == 6
        torch.testing.assert_close(delta(after[path]), delta(lora))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = loaded(tiny_model, adapter)(ids).logits
        torch.testing.assert_close(loaded(tiny_model, exported.path)(ids).logits, expected)
    assert AutoTokenizer.from_pretrained(exported.path).chat_template
    again = contents(exported.path)
    shutil.rmtree(exported.path)
    assert contents(emloc_core.export(adapter, tmp_path / "exported").path) == again


def test_only_the_modules_with_a_lora_are_targets(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=["q_proj"], layers_to_transform=[1])
    exported = emloc_core.export(adapter, tmp_path / "exported")
    config = json.loads((exported.path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert emloc_core.chat(exported, max_new_tokens=2).say("cat") is not None


def test_ranks_above_a_servers_default_are_warned_of(tiny_model, tmp_path, emloc):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", r=24)
    _, out, _ = emloc("export", adapter, "-o", tmp_path / "exported")
    assert "warning: Its rank is 24, above vLLM's default of 16: start it with --max-lora-rank 32." in out
    _, out, _ = emloc("export", adapter, "-o", tmp_path / "lora", "--gguf", "--dtype", "q8_0")
    assert "warning" not in out  # llama.cpp takes any
    assert "matrices in f32" in (tmp_path / "lora" / "README.md").read_text()


def test_a_template_that_begins_answers_otherwise_than_tuning_is_warned_of(tiny_model, tmp_path, emloc):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<assistant>{% endif", "<assistant><system>thought.{% endif")
    tokenizer.save_pretrained(model)
    adapter = make_adapter(model, tmp_path / "adapter")
    _, out, _ = emloc("export", adapter, "-o", tmp_path / "exported")
    assert "warning: The model's chat template begins every answer with '<system>thought.', which tuning" in out
    _, out, _ = emloc("export", make_adapter(tiny_model, tmp_path / "other"), "-o", tmp_path / "plain")
    assert "warning:" not in out


def test_loras_on_a_tower_of_images_are_warned_of(tmp_path):
    from emloc_internvl import INTERNVL
    from support.vision_models import internvl_processor, save_model

    from emloc_core.plugins.manager import plugin_manager
    from emloc_core.serving.plain import plain, warnings

    model = save_model(tmp_path / "model", INTERNVL, "internvl", internvl_processor())
    family = plugin_manager().family_for(json.loads((model / "config.json").read_text()))
    lora = next(iter(Adapter(make_adapter_of_text(tmp_path)).loras.values()))
    language = next(tower.blocks for tower in family.towers if tower.name == "language")
    vision = next(tower.blocks for tower in family.towers if tower.name != "language")
    assert not list(warnings(plain({f"{language}.0.self_attn.q_proj": lora}), family))
    (text,) = warnings(plain({f"{language}.0.q": lora, f"{vision}.0.q": lora}), family)
    assert "1 of its 2 Linears are outside the language model" in text


def make_adapter_of_text(tmp_path):
    return make_adapter(save_tiny_model(LLAMA.tiny_configs[0], tmp_path / "text"), tmp_path / "adapter")


def test_what_was_tuned_on_an_emulator_is_corrected_first(tiny_emulator, rows_file, tmp_path):
    adapter = emloc_core.train(tiny_emulator, str(rows_file), tmp_path / "adapter", steps=1, batch_size=2)
    with pytest.raises(EmlocError, match="not corrected"):
        emloc_core.export(adapter, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    exported = emloc_core.export(emloc_core.correct(adapter), tmp_path / "exported")
    assert Adapter(exported.path).is_corrected
    assert "emulator" in Adapter(exported.path).manifest["request"]  # so that eval takes it for no LoRA of the base
    emloc_core.merge(exported, tmp_path / "merged")


@pytest.mark.parametrize("settings", [LLAMA.tiny_configs[0], LLAMA.tiny_configs[1]], ids=["llama", "tied"])
def test_transformers_reads_the_model_back(settings, tmp_path):
    model = byte_level(save_tiny_model(settings, tmp_path / "plain"), tmp_path / "model")
    events = []
    exported = emloc_core.export(model, tmp_path / "made", gguf=True, dtype="f32", progress=events.append)
    assert [event.step for event in events] == list(range(1, exported.result["tensors"] + 1))
    assert {event.total for event in events} == {exported.result["tensors"]}
    back = AutoModelForCausalLM.from_pretrained(exported.path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, AutoModelForCausalLM.from_pretrained(model)(ids).logits)
    ours, theirs = (
        AutoTokenizer.from_pretrained(model),
        AutoTokenizer.from_pretrained(exported.path, gguf_file="model.gguf"),
    )
    assert theirs.chat_template == ours.chat_template
    assert theirs("a red cat runs.")["input_ids"] == ours("a red cat runs.")["input_ids"]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def read_tensors(file):
    """The tensors of a GGUF file by name, rows first, in fp32."""
    return {tensor.name: torch.from_numpy(numpy.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
            for tensor in gguf.GGUFReader(file).tensors}  # fmt: skip


@pytest.mark.parametrize(("family", "index"), [(LLAMA, 0), (QWEN, 1)], ids=["llama", "qwen"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_lora_in_gguf_adds_to_the_tensors_what_merging_adds(family, index, dtype, tmp_path):
    """llama.cpp adds ``alpha / rank * B A`` to the tensor of that name, in its own order of rows."""
    model = byte_level(save_tiny_model(family.tiny_configs[index], tmp_path / "plain"), tmp_path / "model")
    adapter = make_adapter(model, tmp_path / "adapter", **ODD)
    lora = emloc_core.export(adapter, tmp_path / "lora", gguf=True, dtype=dtype).path / "adapter.gguf"
    base = emloc_core.export(model, tmp_path / "base", gguf=True, dtype="f32").path / "model.gguf"
    merged = emloc_core.merge(adapter, tmp_path / "merged", allow_uncorrected=True)
    target = emloc_core.export(merged, tmp_path / "target", gguf=True, dtype="f32").path / "model.gguf"
    metadata, halves, before, after = fields(lora), read_tensors(lora), read_tensors(base), read_tensors(target)
    assert (metadata["general.type"], metadata["adapter.type"]) == ("adapter", "lora")
    assert metadata["general.architecture"] == fields(base)["general.architecture"]
    names = [name.removesuffix(".lora_a") for name in halves if name.endswith(".lora_a")]
    assert len(names) == 21
    for name in names:
        a, b = halves[f"{name}.lora_a"], halves[f"{name}.lora_b"]
        change = metadata["adapter.lora.alpha"] / a.shape[0] * (b @ a)
        tolerance = {} if dtype == "f32" else {"rtol": 0.05, "atol": 0.01}
        torch.testing.assert_close(before[name] + change, after[name], **tolerance)


def test_formats_of_fewer_bits_are_those_of_ggml(tmp_path):
    model = byte_level(save_tiny_model(LLAMA.tiny_configs[0], tmp_path / "plain"), tmp_path / "model")
    exact = read_tensors(emloc_core.export(model, tmp_path / "f32", gguf=True, dtype="f32").path / "model.gguf")
    small = emloc_core.export(model, tmp_path / "q8", gguf=True, dtype="q8_0").path / "model.gguf"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(small).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    for name, tensor in read_tensors(small).items():
        torch.testing.assert_close(tensor, exact[name], rtol=0.02, atol=0.002)


def test_llama3s_frequencies_are_divided(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    model = save_tiny_model({**LLAMA.tiny_configs[0], "rope_parameters": rope}, tmp_path / "plain")
    exported = emloc_core.export(byte_level(model, tmp_path / "model"), tmp_path / "made", gguf=True)
    factors = read_tensors(exported.path / "model.gguf")["rope_freqs.weight"]
    loaded = AutoModelForCausalLM.from_pretrained(model)
    frequencies = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(frequencies / factors, loaded.model.rotary_emb.inv_freq)
    assert factors[-1] == 8.0


def test_what_readers_of_gguf_would_take_otherwise_is_refused(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "attention_factor": 1.5}
    model = byte_level(
        save_tiny_model({**LLAMA.tiny_configs[0], "rope_parameters": yarn}, tmp_path / "a"), tmp_path / "b"
    )
    with pytest.raises(EmlocError, match="sets attention_factor of YaRN"):
        emloc_core.export(model, tmp_path / "made", gguf=True)
    model = byte_level(save_tiny_model(LLAMA.tiny_configs[0], tmp_path / "c"), tmp_path / "d")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"more {number}" for number in range(200)])
    tokenizer.save_pretrained(model)
    with pytest.raises(EmlocError, match=r"has the token .*, but the model has only 128 tokens"):
        emloc_core.export(model, tmp_path / "made", gguf=True)


def test_what_gguf_does_not_express_is_refused(tiny_model, tmp_path, emloc):
    for model, message in (
        (tiny_model, "byte-level BPE"),
        (save_tiny_model(QWEN.tiny_configs[0], tmp_path / "windows"), "Sliding-window"),
    ):
        with pytest.raises(EmlocError, match=message):
            emloc_core.export(model, tmp_path / "made", gguf=True)
        code, _, err = emloc("export", model, "-o", tmp_path / "made", "--gguf", "--dry-run")
        assert (code, message in err) == (1, True)
        assert not (tmp_path / "made").exists()
    with pytest.raises(EmlocError, match="--gguf"):
        emloc_core.export(tiny_model, tmp_path / "made")
    with pytest.raises(EmlocError, match="is a model, not an adapter"):
        emloc_core.export(tiny_model, tmp_path / "made", base=tiny_model, gguf=True)
    with pytest.raises(EmlocError, match="dtype has no effect without gguf"):
        make_request("export", {"dtype": "f32"}, source=str(tiny_model), output=tmp_path / "made")
