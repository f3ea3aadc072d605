"""What ``compat/transformers.py`` needs of transformers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.contracts import contract
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.utils import chat_template_utils

from emloc_core.compat import transformers

_SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
_TEMPLATE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


@contract("transformers", "transformers.wrap_template_compiler")
def test_all_chat_templates_are_compiled_by_one_function(tiny_model, monkeypatch):
    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", chat_template_utils._compile_jinja_template)
    tokenizer, compiled = AutoTokenizer.from_pretrained(tiny_model), []
    transformers.wrap_template_compiler(lambda compile_: lambda text: compiled.append(text) or compile_(text))
    given = [{"role": "assistant", "content": "yes"}]
    masked = {"return_assistant_tokens_mask": True, "return_dict": True}
    for number, more in enumerate([{"tokenize": False}, {}, masked]):
        template = _TEMPLATE + " " * number  # of which nothing is kept
        tokenizer.apply_chat_template(given, chat_template=template, **more)
        assert template in compiled, f"apply_chat_template({more}) does not call _compile_jinja_template"


@contract("transformers", "transformers.Compile")
def test_a_compiled_template_renders_and_generates(tiny_model, monkeypatch):
    """``files/templates.py`` puts an object with these three names in its place."""
    used = set()

    class Used:
        def __init__(self, template):
            self._template = template

        def __getattr__(self, name):
            used.add(name)
            return getattr(self._template, name)

    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", chat_template_utils._compile_jinja_template)
    transformers.wrap_template_compiler(lambda compile_: lambda text: Used(compile_(text)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for more in {}, {"return_assistant_tokens_mask": True}:
        tokenizer.apply_chat_template([{"role": "user", "content": "yes"}], chat_template=_TEMPLATE, **more)
    assert used <= {"render", "generate", "environment"}, f"a compiled template is asked for {sorted(used)}"


@contract("transformers", "transformers.never_ask_for_code")
def test_code_of_a_model_is_refused_without_a_question(tmp_path, monkeypatch):
    transformers.never_ask_for_code()
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(tmp_path, local_files_only=True)


@contract("transformers", "transformers.use_one_gpu")
def test_a_config_says_how_many_gpus_there_are(tmp_path):
    from transformers import TrainingArguments

    config = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    config._n_gpu = 4
    assert config.n_gpu == 4, "n_gpu is not read from _n_gpu"
    transformers.use_one_gpu(config)
    assert config.n_gpu == 1, "n_gpu is not read from _n_gpu"


def read(model, directory):
    """Load a saved model's tensors into another one on the meta device; return it, and what was loaded from what."""
    stored = {key: torch.empty(0) for key in model.state_dict()}
    with torch.device("meta"):
        empty = type(model)(model.config)
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as file:
        loader = transformers.TensorLoader(empty)
        sources = loader.sources(file.keys())
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        found = loader.load(slices, torch.float32, torch.device("cpu"))
    assert stored.keys() == sources.keys(), f"other parameters are made: {sorted(stored.keys() ^ sources.keys())}"
    return empty, sources, found


@contract("transformers", "transformers.TensorLoader")
def test_slices_are_loaded_into_a_model_on_the_meta_device(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=False, **_SIZES))
    model.save_pretrained(tmp_path)
    found, sources, problems = read(model, tmp_path)
    assert problems == ({}, []), f"it cannot load what was saved: {problems}"
    assert sources["lm_head.weight"] == ["lm_head.weight"]
    for name, parameter in model.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), f"{name} is loaded with other numbers"


@contract("transformers", "transformers.TensorLoader")
def test_experts_of_their_own_are_loaded_fused(tmp_path):
    model = MixtralForCausalLM(MixtralConfig(vocab_size=9, num_local_experts=2, num_key_value_heads=1, **_SIZES))
    model.save_pretrained(tmp_path)
    found, sources, problems = read(model, tmp_path)
    assert problems == ({}, []), f"it cannot load what was saved: {problems}"
    (name,) = (name for name in sources if name.endswith("gate_up_proj"))
    assert len(sources[name]) == 4, f"{name} is not made of two matrices of each expert: {sources[name]}"
    assert torch.equal(found.get_parameter(name), model.get_parameter(name)), f"{name} is loaded with other numbers"


@contract("transformers", "transformers.TensorLoader")
def test_what_cannot_be_loaded_is_named(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=False, **_SIZES))
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file({**tensors, "lm_head.weight": torch.zeros(7, 8)}, tmp_path / "model.safetensors")
    _, _, (_, mismatched) = read(model, tmp_path)
    told = [(name, tuple(given), tuple(expected)) for name, given, expected in mismatched]
    assert told == [("lm_head.weight", (7, 8), (9, 8))], f"a wrong shape is told as {told}"


@contract("transformers", "transformers.TensorLoader")
def test_tensors_are_read_one_after_another(monkeypatch):
    from transformers import core_model_loading

    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **_SIZES))
    monkeypatch.setattr(core_model_loading, "ThreadPoolExecutor", lambda *_, **__: pytest.fail("it starts threads"))
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = transformers.TensorLoader(model).load(tensors, torch.float32, torch.device("cpu"))
    assert found == ({}, []), f"HF_DEACTIVATE_ASYNC_LOAD does not keep the loader from threads: {found}"


@contract("transformers", "transformers.TensorLoader")
def test_an_operation_that_fails_gives_its_reason_first():
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Refusing(ConversionOps):
        def convert(self, *_, **__):
            raise ValueError("scales are NaN")

    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=False, **_SIZES))
    converter = WeightConverter(["lm_head.codes"], "lm_head.weight", operations=[Refusing()])
    tensors = {**model.state_dict(), "lm_head.codes": torch.zeros(9, 8)}
    del tensors["lm_head.weight"]
    loader = transformers.TensorLoader(model, [converter])
    assert loader.sources(tensors)["lm_head.weight"] == ["lm_head.codes"], "a converter's target is another"
    problems, _ = loader.load(tensors, torch.float32, torch.device("cpu"))
    assert list(problems) == ["lm_head.weight"], f"what could not be made is named {list(problems)}"
    assert "scales are NaN" in problems["lm_head.weight"], f"the reason is {problems['lm_head.weight']!r}"
