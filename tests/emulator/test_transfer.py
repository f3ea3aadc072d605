"""PEFT, in any script, refuses to put on an emulator what would not hold on its base."""

import subprocess
import sys

import pytest
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from support.jobs import compress_job
from support.models import save_in_four_bits
from transformers import AutoModelForCausalLM

import emloc_core.standins.quantizer  # noqa: F401 - so that emulators load
from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.settings import CompressSettings

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def load(tiny_emulator):
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_emulator)


@pytest.fixture(scope="module")
def load_four_bits(tiny_model, tmp_path_factory):
    """An emulator in four bits, whose layers are bitsandbytes' own."""
    settings = CompressSettings(kind="nf4", calibration="none", keep="head")
    rows = load_rows([{"text": "a"}])
    emulator = compress_job(tiny_model, rows, tmp_path_factory.mktemp("nf4") / "emulator", settings).run()
    return lambda: AutoModelForCausalLM.from_pretrained(emulator)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "DoRA rescales the weight"),
        ({"init_lora_weights": "pissa"}, "splits the weight"),
        ({"init_lora_weights": "olora"}, "splits the weight"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "splits the weight"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["o_proj"]}, r"o_proj differs.*only model.embed_tokens and lm_head can be trained"),
        ({"modules_to_save": ["norm"]}, "norm differs"),
        ({"trainable_token_indices": {"up_proj": [1]}}, "up_proj differs"),
    ],
)
def test_what_would_not_hold_on_the_base_is_refused_where_an_emulator_is_wrapped(load, load_four_bits, settings, why):
    config = LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
    for emulator in (load(), load_four_bits()):
        with pytest.raises(EmlocError, match=why):
            get_peft_model(emulator, config)
    with pytest.raises(EmlocError, match=why):
        inject_adapter_in_model(config, load())


def test_other_adapters_are_refused_and_ordinary_ones_are_not(load, load_four_bits):
    with pytest.raises(EmlocError, match="it is a IA3, and only a LoRA"):
        get_peft_model(load(), IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]))
    layers = {"layers_to_transform": [0], "rank_pattern": {"q_proj": 2}, "init_lora_weights": "gaussian"}
    dense = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3]}}
    for settings in (layers, dense, {"trainable_token_indices": [3]}):
        config = LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
        assert isinstance(get_peft_model(load(), config), PeftModel)
    assert isinstance(get_peft_model(load_four_bits(), config), PeftModel)


@pytest.mark.parametrize("in_four_bits", [False, True])
def test_an_ordinary_model_takes_what_peft_does(tiny_model, tmp_path, in_four_bits):
    base = save_in_four_bits(tiny_model, tmp_path / "packed") if in_four_bits else tiny_model
    config = LoraConfig(target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM")
    assert isinstance(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), PeftModel)


@pytest.mark.thorough
def test_loading_an_emulator_does_not_import_peft(tiny_emulator):
    code = (
        "import sys, emloc_core.standins.quantizer; from transformers import AutoModelForCausalLM as m; "
        f"m.from_pretrained({str(tiny_emulator)!r}); sys.exit('peft.tuners' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
