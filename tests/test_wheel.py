"""The built wheel works outside the checkout: commands, families, the demo and task templates travel in it."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def environment(new_environment):
    """A virtual environment with the wheel of emloc in it."""
    return new_environment()


def test_families_and_plugins_are_in_the_wheel(environment, tmp_path):
    listed = json.loads(environment.run("emloc", "families", "--json", cwd=tmp_path))
    assert {"internvl", "llama", "qwen"} <= {family["name"] for family in listed["families"]}
    assert {plugin["name"]: plugin["error"] for plugin in listed["plugins"]} == dict.fromkeys(
        ["demo", "internvl", "llama", "qwen"]
    )
    modules = "emloc_core, emloc_llama, emloc_demo"
    files = environment.run(
        "python", "-c", f"import {modules}; print(*(each.__file__ for each in ({modules})))", cwd=tmp_path
    )
    assert all(Path(file).is_relative_to(environment.directory) for file in files.split())


def test_a_stage_and_a_task_template_work_from_the_wheel(environment, tiny_model, rows_file, tmp_path):
    def emloc(*argv):
        environment.run("emloc", *argv, cwd=tmp_path)

    emloc("compress", tiny_model, "--data", rows_file, "-o", "emulator", "--samples", "8")
    assert (tmp_path / "emulator" / "emloc.json").is_file()
    emloc("eval", "--new-task", "completion_nll", "--data", rows_file, "-o", "task.yaml")
    emloc("eval", "task.yaml", "--base", tiny_model, "--emulator", "emulator", "-o", "evaluation", "--limit", "4")
    systems = json.loads((tmp_path / "evaluation" / "results.json").read_text())["systems"]
    assert set(systems) == {"base", "emulator"}
    assert all(system["nll"] > 0 for system in systems.values())


def test_the_registry_is_in_the_wheel(environment, tmp_path):
    script = "from emloc_core.registry import load_entries; print(*{entry.file.parent for entry in load_entries()})"
    directory = Path(environment.run("python", "-c", script, cwd=tmp_path).strip())
    assert directory.is_relative_to(environment.directory)
    entries = Path(__file__).parent.parent / "registry"
    assert {file.name for file in directory.glob("*.toml")} == {file.name for file in entries.glob("*.toml")}
