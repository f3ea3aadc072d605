"""What ``compat/transformers.py`` needs of transformers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.contracts import contract
from support.marks import thorough
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainingArguments,
)
from transformers.utils import chat_template_utils

from emloc_core.compat import transformers

_SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
_TEMPLATE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


@contract("transformers", "compat.transformers.wrap_template_compiler")
def test_all_chat_templates_are_compiled_by_one_function(tiny_model, monkeypatch):
    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", chat_template_utils._compile_jinja_template)
    tokenizer, compiled = AutoTokenizer.from_pretrained(tiny_model), []
    transformers.wrap_template_compiler(lambda compile_: lambda text: compiled.append(text) or compile_(text))
    messages = [{"role": "assistant", "content": "yes"}]
    masked = {"return_assistant_tokens_mask": True, "return_dict": True}
    for number, more in enumerate([{"tokenize": False}, {}, masked]):
        template = _TEMPLATE + " " * number  # not compiled before
        tokenizer.apply_chat_template(messages, chat_template=template, **more)
        assert template in compiled, f"apply_chat_template({more}) does not call _compile_jinja_template"


@contract("transformers", "compat.transformers.Compile")
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


@contract("transformers", "compat.transformers.never_ask_for_code")
def test_code_of_a_model_is_refused_without_a_question(tmp_path, monkeypatch):
    transformers.never_ask_for_code()
    questions = []
    monkeypatch.setattr("builtins.input", lambda *_: questions.append(True) or "n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    assert not questions, "TIME_OUT_REMOTE_CODE = 0 does not keep it from asking on the terminal"


@contract("transformers", "compat.transformers.use_one_gpu")
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
        problems = loader.load(slices, torch.float32, torch.device("cpu"))
    assert stored.keys() == sources.keys(), f"other parameters are made: {sorted(stored.keys() ^ sources.keys())}"
    return empty, sources, problems


@contract("transformers", "compat.transformers.TensorLoader")
def test_slices_are_loaded_into_a_model_on_the_meta_device(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=False, **_SIZES))
    model.save_pretrained(tmp_path)
    loaded, sources, problems = read(model, tmp_path)
    assert problems == ({}, []), f"it cannot load what was saved: {problems}"
    assert sources["lm_head.weight"] == ["lm_head.weight"]
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), f"{name} is loaded with other numbers"


@contract("transformers", "compat.transformers.TensorLoader")
def test_experts_of_their_own_are_loaded_fused(tmp_path):
    model = MixtralForCausalLM(MixtralConfig(vocab_size=9, num_local_experts=2, num_key_value_heads=1, **_SIZES))
    model.save_pretrained(tmp_path)
    loaded, sources, problems = read(model, tmp_path)
    assert problems == ({}, []), f"it cannot load what was saved: {problems}"
    (name,) = (name for name in sources if name.endswith("gate_up_proj"))
    assert len(sources[name]) == 4, f"{name} is not made of two matrices of each expert: {sources[name]}"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name)), f"{name} is loaded with other numbers"


@contract("transformers", "compat.transformers.TensorLoader")
def test_what_cannot_be_loaded_is_named(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=False, **_SIZES))
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file({**tensors, "lm_head.weight": torch.zeros(7, 8)}, tmp_path / "model.safetensors")
    _, _, (_, mismatched) = read(model, tmp_path)
    mismatches = [(name, tuple(actual), tuple(expected)) for name, actual, expected in mismatched]
    assert mismatches == [("lm_head.weight", (7, 8), (9, 8))], f"a wrong shape is told as {mismatches}"


@contract("transformers", "compat.transformers.TensorLoader")
def test_tensors_are_read_one_after_another(monkeypatch):
    from transformers import core_model_loading

    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **_SIZES))
    pool, pools = core_model_loading.ThreadPoolExecutor, []
    monkeypatch.setattr(core_model_loading, "ThreadPoolExecutor", lambda *a, **k: pools.append(1) or pool(*a, **k))
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    problems = transformers.TensorLoader(model).load(tensors, torch.float32, torch.device("cpu"))
    assert problems == ({}, []), f"it cannot load a model's own tensors: {problems}"
    assert not pools, "HF_DEACTIVATE_ASYNC_LOAD does not keep the loader from threads"


@contract("transformers", "compat.transformers.TensorLoader")
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


@contract("transformers", "compat.transformers.grouped_product")
def test_groups_of_rows_are_multiplied_by_a_matrix_each():
    x, stack = torch.randn(5, 8), torch.randn(2, 4, 8)
    product = transformers.grouped_product(x, stack, torch.tensor([2, 5], dtype=torch.int32))
    expected = torch.cat([x[:2] @ stack[0].T, x[2:] @ stack[1].T])
    assert torch.allclose(product, expected, atol=1e-6), "_grouped_linear gives another product"


@contract("transformers", "compat.transformers.gated")
def test_the_gate_is_the_first_half():
    """And a module of experts says how it is laid out, as ``standins/experts.py`` asks."""
    config = MixtralConfig(num_local_experts=2, num_key_value_heads=1, **_SIZES)
    experts = MixtralForCausalLM(config).model.layers[0].mlp.experts
    gate, up = x = torch.randn(2, 5, 16)
    output = transformers.gated(experts, torch.cat([*x], dim=-1))
    assert torch.allclose(output, nn.functional.silu(gate) * up), "_apply_gate computes something else"
    layout = {name: getattr(experts, name, None) for name in ("has_gate", "is_transposed", "has_bias")}
    assert layout == {"has_gate": True, "is_transposed": False, "has_bias": False}, f"experts say {layout}"
    shapes = [tuple(stack.shape) for stack in (experts.gate_up_proj, experts.down_proj)]
    assert shapes == [(2, 32, 8), (2, 8, 16)], f"experts are laid out as {shapes}"


class Halved(nn.Linear):
    """A Linear whose weight is made of two parameters, one of them of bytes."""

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)
        m, n = like.weight.shape
        self.weight = nn.Parameter(torch.empty(m, n, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(m, device="meta"))
        self.register_parameter("bias", None)


@pytest.fixture
def quantised(tmp_path):
    """A function that loads a saved model of a quantisation of its own, and the calls of its quantizer."""
    from transformers import quantizers
    from transformers.quantizers import auto
    from transformers.utils.quantization_config import QuantizationConfigMixin

    calls = []

    class Config(QuantizationConfigMixin):
        def __init__(self, **_):
            self.quant_method = "halved"

    class Quantizer(quantizers.HfQuantizer):
        requires_calibration = True

        def preprocess_model(self, model, *args, **options):
            super().preprocess_model(model, *args, **options)
            calls.append("preprocess_model")
            model.lm_head = Halved(model.lm_head)
            transformers.keep_as_it_is(model.lm_head)

        def postprocess_model(self, model, **options):
            super().postprocess_model(model, **options)
            calls.append("postprocess_model")
            calls.append({name for name, part in model.named_parameters() if not transformers.was_loaded(part)})
            return model

        def is_serializable(self):
            return True

        @property
        def is_trainable(self):
            return True

    quantizers.register_quantization_config("halved")(Config)
    quantizers.register_quantizer("halved")(Quantizer)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=False, **_SIZES))
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.config.architectures = ["LlamaForCausalLM"]
    content = model.config.to_dict() | {"quantization_config": {"quant_method": "halved"}}

    def load(**others):
        (tmp_path / "config.json").write_text(json.dumps(content))
        save_file({**tensors, **others}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return LlamaForCausalLM.from_pretrained(tmp_path)

    yield load, calls
    for mapping in auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING:
        mapping.pop("halved", None)


@contract("transformers", "standins.quantizer")
def test_a_quantizer_replaces_layers_before_loading_and_sees_them_afterwards(quantised):
    load, calls = quantised
    codes = torch.arange(72, dtype=torch.uint8).reshape(9, 8)
    model = load(**{"lm_head.weight": codes, "lm_head.scales": torch.ones(9)})
    assert calls[:2] == ["preprocess_model", "postprocess_model"], f"a quantizer is called as {calls[:2]}"
    assert torch.equal(model.lm_head.weight, codes), "a replaced layer's codes are not loaded as they are"


@contract("transformers", "compat.transformers.was_loaded")
def test_a_parameter_says_whether_it_was_in_the_files(quantised):
    load, calls = quantised
    load(**{"lm_head.weight": torch.zeros(9, 8, dtype=torch.uint8)})
    assert calls[-1] == {"lm_head.scales"}, f"_is_hf_initialized is not set by loading: missing are {calls[-1]}"


@contract("transformers", "compat.transformers.kept_in_fp32")
def test_models_name_what_they_keep_in_fp32():
    from transformers import T5ForConditionalGeneration

    names = transformers.kept_in_fp32(T5ForConditionalGeneration)
    assert names == ["wo"], f"_keep_in_fp32_modules of T5 are {names}"


@contract("transformers", "compat.transformers.has_own_cache")
def test_models_that_generate_with_a_cache_of_their_own_are_known():
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=9, **_SIZES))
        minimax = MiniMaxForCausalLM(MiniMaxConfig(vocab_size=9, num_local_experts=2, **_SIZES))
    assert transformers.has_own_cache(minimax), "_supports_default_dynamic_cache is true of MiniMax"
    assert not transformers.has_own_cache(llama), "_supports_default_dynamic_cache is false of Llama"


@contract("transformers", "compat.transformers.laid_out_otherwise")
def test_models_whose_modules_quantisation_replaces_are_known():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(**_SIZES, num_local_experts=2, vocab_size=9, head_dim=8, num_key_value_heads=1)
    with torch.device("meta"):
        model = Llama4ForCausalLM(config)
    paths = transformers.laid_out_otherwise(model, "bitsandbytes")
    assert paths == ["model.layers.0.feed_forward.experts"], f"of Llama 4, bitsandbytes replaces {paths}"
    assert not transformers.laid_out_otherwise(model, "emloc")


@pytest.mark.parametrize("first", ["transformers.quantizers", *thorough("transformers.modeling_utils")])
def test_emulators_are_registered_whatever_a_program_imports_first(first):
    """It may be what imports torch, whose entry point we are: the module we wait for is then half imported."""
    script = f"import {first}, transformers.modeling_utils as _; from transformers.quantizers import auto"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; print('emloc' in auto.AUTO_QUANTIZER_MAPPING)"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    with contract("transformers", "compat.imports.is_being_imported"):
        assert done.stdout == "True\n", done.stderr


@contract("transformers", "compat.transformers.retie")
def test_parameters_are_tied_under_other_names_and_saved_once(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=True, **_SIZES))
    for layer in (model.lm_head, model.model.embed_tokens):
        layer.codes = layer.weight
        del layer.weight
    transformers.retie(model, {"lm_head.codes": "model.embed_tokens.codes"})
    model.tie_weights()
    assert model.lm_head.codes is model.model.embed_tokens.codes, "what is tied is not read from all_tied_weights_keys"
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {key for key in saved if "codes" in key} == {"model.embed_tokens.codes"}, "tied parameters are saved twice"


@contract("transformers", "compat.transformers.tie_as_its_class_does")
def test_a_model_is_tied_again_as_its_class_says():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=True, **_SIZES))
    transformers.retie(model, {})
    model.lm_head.weight = nn.Parameter(torch.zeros(9, 8))
    transformers.tie_as_its_class_does(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "it is not tied as _tied_weights_keys says"


@contract("transformers", "compat.transformers.recomputing_field")
def test_activations_are_recomputed_by_the_name_that_there_is(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **_SIZES))
    transformers.recompute_activations(model)
    assert model.is_gradient_checkpointing, "a model's activations are not recomputed"
    config = TrainingArguments(str(tmp_path), use_cpu=True, **{transformers.recomputing_field(): True})
    assert config.gradient_checkpointing, "the field is not the one that a trainer reads"
