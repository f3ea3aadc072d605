"""The built distributions: what PyPI wants of them, and that the wheel works outside the checkout.

The stages and task templates do too: ``test_template.py`` has a stranger's family go all the way with them.
"""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT


@pytest.fixture(scope="module")
def environment(new_environment):
    """A virtual environment with the wheel of emloc in it."""
    return new_environment()


def test_pypi_takes_both_distributions_of_the_version_that_the_changelog_has(wheel):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = sorted(wheel.parent.glob("emloc-*"))
    assert [file.name for file in files] == [f"emloc-{version}-py3-none-any.whl", f"emloc-{version}.tar.gz"]
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_what_is_compiled_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist()}
    assert {"columns.h", "grid.c", "trellis.c", "unpacking.c"} <= names


@pytest.mark.thorough
def test_the_doctor_finds_nothing_wrong_with_it(environment, tmp_path):
    report = json.loads(environment.run("emloc", "doctor", "--json", cwd=tmp_path))
    assert report["healthy"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {check["name"]: check["text"] for check in report["checks"]}["emloc"] == version


def test_families_and_plugins_are_in_the_wheel(environment, tmp_path):
    listed = json.loads(environment.run("emloc", "families", "--json", cwd=tmp_path))
    assert {"gemma", "glm", "internvl", "llama", "phi", "qwen"} <= {family["name"] for family in listed["families"]}
    assert {plugin["name"]: plugin["error"] for plugin in listed["plugins"]} == dict.fromkeys(
        ["demo", "diffusers", "gemma", "glm", "internvl", "llama", "phi", "qwen"]
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
