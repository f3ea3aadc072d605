"""What ``compat/peft.py`` needs of PEFT."""

import warnings
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from support.contracts import contract
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from emloc_core.compat import peft
from emloc_core.compat.imports import when_imported

_SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}


class RefusedError(Exception):
    pass


@pytest.fixture
def checked(monkeypatch):
    """A list of the adapters that are put into models, each refused."""
    from peft.tuners.tuners_utils import BaseTuner

    with contract("peft", "compat.peft.check_adapters"):
        monkeypatch.setattr(BaseTuner, "inject_adapter", BaseTuner.inject_adapter)
    calls = []

    def check(model, config):
        calls.append((model, config["r"]))
        raise RefusedError

    peft.check_adapters(check)
    return calls


@pytest.mark.parametrize("way", ["get_peft_model", "inject_adapter_in_model", "from_pretrained"])
@contract("peft", "compat.peft.check_adapters")
def test_all_ways_to_put_in_an_adapter_are_checked(way, tmp_path, request):
    config = LoraConfig(r=3, target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM(LlamaConfig(**_SIZES)), config).save_pretrained(tmp_path)
    calls, model = request.getfixturevalue("checked"), LlamaForCausalLM(LlamaConfig(**_SIZES))
    ways = {
        "get_peft_model": lambda: get_peft_model(model, config),
        "inject_adapter_in_model": lambda: inject_adapter_in_model(config, model),
        "from_pretrained": lambda: PeftModel.from_pretrained(model, tmp_path),
    }
    with suppress(RefusedError):
        ways[way]()
    assert calls == [(model, 3)], f"{way} does not call BaseTuner.inject_adapter with the model"
    assert not any("lora" in name for name, _ in model.named_modules()), f"{way} changes the model before that"


@contract("peft", "compat.imports.when_imported")
def test_adapters_are_put_in_by_a_module_of_their_own():
    called = []
    when_imported(peft._WRAPS, lambda: called.append(True))
    assert called, f"importing peft does not import {peft._WRAPS}"


def test_a_wrapped_linears_weight_is_named_base_layer():
    """``exact/steps.py`` finds the base's parameters by it."""
    with contract("peft", "compat.peft.WRAPPER"):
        wrapped = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        names = {name for name, _ in wrapped.base_model.model.named_parameters() if "lora" not in name}
        assert names == {f"0.{peft.WRAPPER}weight", f"0.{peft.WRAPPER}bias"}, f"the weight is named {names}"
        assert torch.is_tensor(wrapped.base_model.model[0].get_base_layer().weight)


@contract("peft", "compat.peft.parameter_wrappers")
def test_a_module_is_wrapped_once_for_each_of_its_parameters_the_first_innermost(monkeypatch):
    from peft.tuners.tuners_utils import BaseTuner

    monkeypatch.setattr(BaseTuner, "inject_adapter", BaseTuner.inject_adapter)
    done = []
    peft.check_adapters(lambda _model, _config: None, done.append)
    config = MixtralConfig(**_SIZES, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1)
    targets = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    model = MixtralForCausalLM(config)
    with warnings.catch_warnings(action="error", category=RuntimeWarning):
        pattern = {"experts.gate_up_proj": 2}
        get_peft_model(model, LoraConfig(r=1, target_modules=[], target_parameters=targets, rank_pattern=pattern))
    assert done == [model], "inject_adapter is given another model"
    ((path, wrappers),) = peft.parameter_wrappers(model)
    assert path == "model.layers.0.mlp.experts"
    assert [wrapper.parameter_name for wrapper in wrappers] == ["down_proj", "gate_up_proj"], (
        "PEFT nests in another order"
    )
    outer, inner = wrappers
    assert (outer.lora_A["default"].weight.shape, outer.lora_B["default"].weight.shape) == ((3, 8), (8, 3))
    assert (inner.lora_A["default"].weight.shape, inner.lora_B["default"].weight.shape) == ((6, 8), (16, 6))
    assert outer.get_base_layer() is inner.get_base_layer()
    assert (outer.active_adapters, outer.merged, outer.disable_adapters) == (["default"], False, False)
    assert (outer.r, inner.r) == ({"default": 1}, {"default": 2})
