"""An adapter's numbers: those that its scale is computed from, and its weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from emloc_core.adapters.adapter import Adapter
from emloc_core.errors import EmlocError

PATH = "base_model.model.model.layers.0.self_attn.q_proj"


def write(directory, config=None, **tensors):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **(config or {})}
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    halves = {"A": torch.ones(4, 16), "B": torch.ones(16, 4), **tensors}
    save_file({f"{PATH}.lora_{name}.weight": half for name, half in halves.items()},
              directory / "adapter_model.safetensors")  # fmt: skip
    return directory


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 0}, {"lora_alpha": -8}, {"lora_alpha": "8"}, {"lora_alpha": None}, {"lora_alpha": True},
        {"lora_alpha": 10**400}, {"lora_alpha": 5e-324}, {"lora_alpha": 1e308}, {"lora_alpha": 10**400, "r": 10**400},
        {"r": 0}, {"r": -4}, {"r": 4.0}, {"r": None}, {"r": True}, {"r": 8}, {"r": [4]},
        {"use_rslora": "yes"}, {"use_rslora": None},
        {"alpha_pattern": {"q_proj": 0}}, {"alpha_pattern": {"q_proj": "8"}}, {"alpha_pattern": [8]},
        {"alpha_pattern": {"other": -1}}, {"alpha_pattern": {"q_proj": None}}, {"alpha_pattern": "q_proj"},
        {"rank_pattern": {"q_proj": 8}}, {"rank_pattern": {"q_proj": 4.0}}, {"rank_pattern": {"q_proj": -4}},
    ],
)  # fmt: skip
def test_a_scale_has_to_be_a_number_above_zero(tmp_path, config):
    directory = write(tmp_path / "adapter", config)
    with pytest.raises(EmlocError, match="adapter"):
        _ = Adapter(directory).loras


@pytest.mark.parametrize("tensors", [{}, {"base_model.model.lm_head.base_layer.weight": torch.ones(4, 4)}])
def test_an_adapter_without_a_lora_is_damaged(tmp_path, tensors):
    directory = write(tmp_path / "adapter")
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(EmlocError, match="holds no LoRA") as raised:
        _ = Adapter(directory).loras
    assert raised.value.code == "damaged"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
def test_a_scale_has_to_be_finite(tmp_path, field, number):
    directory = write(tmp_path / "adapter")
    value = number if field == "lora_alpha" else f'{{"q_proj": {number}}}'
    (directory / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "{field}": {value}}}'
    )
    with pytest.raises(EmlocError, match=r"not valid JSON|lora_alpha|alpha_pattern"):
        _ = Adapter(directory).loras


@pytest.mark.parametrize(
    ("half", "message"),
    [
        (torch.full((4, 16), float("nan")), "NaN"),
        (torch.full((4, 16), float("inf")), "NaN or Inf"),
        (torch.ones(4, 16, dtype=torch.int32), "not floating-point"),
        (torch.ones(4, 16, dtype=torch.bool), "not floating-point"),
        (torch.ones(4, 16, 1), "not part of a LoRA on a Linear"),
        (torch.ones(3, 16), "rank 4"),
        (torch.ones(0, 16), "rank 4"),
    ],
)
def test_halves_are_finite_floats_of_one_rank(tmp_path, half, message):
    with pytest.raises(EmlocError, match=message):
        _ = Adapter(write(tmp_path / "adapter", A=half)).loras


def test_a_good_one_is_read(tmp_path):
    options = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"self_attn.q_proj": 3.0}, "r": 2}
    (lora,) = Adapter(write(tmp_path / "adapter", options)).loras.values()
    assert lora.scale == 0.75
