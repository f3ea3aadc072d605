"""Patterns of adapters: ordinary ones are matched, and one that might never end is refused before it is tried."""

from pathlib import Path
from typing import Any

import pytest

from emloc_core.adapters.adapter import config_problems
from emloc_core.errors import EmlocError
from emloc_core.evaluation.loading import load_system
from emloc_core.files.documents import write_json
from emloc_core.files.patterns import pattern_problems

ORDINARY = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    r"^model\.layers\.[0-9]+\.mlp\.(gate|up|down)_proj$",
    r".*layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|up_proj|gate_proj|down_proj)",
    r"layers\.(0|1|2|3)\..*_proj",
]
ENDLESS = [
    r"(.*)*x",
    r"(a+)+b",
    r"(\w|\w)" * 40 + "!",
    r"a?" * 40 + "a" * 40,
    r".*.*.*.*x",
    r"(?:m|o|.){60}!",
    r"(.*)\1\1x",
    r"(.+)?" * 9,
    r"[a-z]+" * 9,
    "(" * 2000 + ")" * 2000,
]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_are_taken(pattern: str) -> None:
    assert pattern_problems({"target_modules": pattern, "rank_pattern": {pattern: 4}}) == []


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_what_may_never_end_is_refused(pattern: str, field: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, field: {pattern: 4}}
    assert any("forever" in problem or "regular expression" in problem for problem in config_problems(config))


def test_many_patterns_count_together() -> None:
    assert pattern_problems({"rank_pattern": {f"layers.{number}.q_proj": 4 for number in range(5000)}}) == []
    assert pattern_problems({"rank_pattern": {f".*{number}.*x": 4 for number in range(50)}}) != []


@pytest.mark.parametrize("fields", [{"target_modules": "(.*)*x"}, {"layers_pattern": ["(a+)+b"]}])
def test_peft_does_not_match_them_either(tiny_model: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", **fields})
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(EmlocError) as caught:
        load_system(tiny_model, tmp_path)
    assert caught.value.code == "refused"
