"""The built wheel works outside the checkout: families, the demo and the registry travel in it.

The stages and task templates do too: ``test_template.py`` has a stranger's family go all the way with them.
"""

import json
from pathlib import Path

import pytest
from support.paths import ROOT


@pytest.fixture(scope="module")
def environment(new_environment):
    """A virtual environment with the wheel of emloc in it."""
    return new_environment()


def test_families_and_plugins_are_in_the_wheel(environment, tmp_path):
    listed = json.loads(environment.run("emloc", "families", "--json", cwd=tmp_path))
    assert {"gemma", "glm", "internvl", "llama", "phi", "qwen"} <= {family["name"] for family in listed["families"]}
    assert {plugin["name"]: plugin["error"] for plugin in listed["plugins"]} == dict.fromkeys(
        ["demo", "gemma", "glm", "internvl", "llama", "phi", "qwen"]
    )
    modules = "emloc_core, emloc_llama, emloc_demo"
    files = environment.run(
        "python", "-c", f"import {modules}; print(*(each.__file__ for each in ({modules})))", cwd=tmp_path
    )
    assert all(Path(file).is_relative_to(environment.directory) for file in files.split())


def test_the_registry_is_in_the_wheel(environment, tmp_path):
    script = (
        "from emloc_core.registry.registry import load_entries; print(*{entry.file.parent for entry in load_entries()})"
    )
    directory = Path(environment.run("python", "-c", script, cwd=tmp_path).strip())
    assert directory.is_relative_to(environment.directory)
    entries = ROOT / "registry"
    assert {file.name for file in directory.glob("*.toml")} == {file.name for file in entries.glob("*.toml")}


def test_transformers_alone_loads_an_emulator_where_emloc_is_installed(environment, tiny_emulator, tmp_path):
    script = (
        "from transformers import AutoModelForCausalLM; import sys; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(model.model.layers[0].mlp.up_proj))"
    )
    assert "LowRankLinear" in environment.run("python", "-c", script, tiny_emulator, cwd=tmp_path)
