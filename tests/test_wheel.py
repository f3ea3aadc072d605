"""The built wheel works outside the checkout: commands, families, the demo and task templates travel in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built from the checkout and installed into a folder; dependencies are the test environment's."""
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(place), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = place.glob("emloc-*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place / "site"), str(wheel)]
    subprocess.run(pip, check=True)
    return place / "site"


def run(site, cwd, *argv):
    """Run ``emloc`` from the installed wheel; the folder comes before everything else on the path."""
    environment = {**os.environ, "PYTHONPATH": str(site), "EMLOC_STRICT_PLUGINS": "1"}
    argv = [sys.executable, "-m", "emloc_core", *map(str, argv)]
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_families_and_plugins_are_in_the_wheel(installed, tmp_path):
    listed = json.loads(run(installed, tmp_path, "families", "--json"))
    assert [family["name"] for family in listed["families"]] == ["internvl", "llama", "qwen"]
    assert {plugin["name"]: plugin["error"] for plugin in listed["plugins"]} == dict.fromkeys(
        ["demo", "internvl", "llama", "qwen"]
    )
    where = [sys.executable, "-c", "import emloc_core, emloc_llama; print(emloc_core.__file__, emloc_llama.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    files = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(Path(file).is_relative_to(installed) for file in files.split())


def test_a_stage_and_a_task_template_work_from_the_wheel(installed, tiny_model, rows_file, tmp_path):
    run(installed, tmp_path, "compress", tiny_model, "--data", rows_file, "-o", "emulator", "--samples", "8")
    assert (tmp_path / "emulator" / "emloc.json").is_file()
    run(installed, tmp_path, "eval", "--new-task", "completion_nll", "--data", rows_file, "-o", "task.yaml")
    run(installed, tmp_path, "eval", "task.yaml", "--base", tiny_model, "--emulator", "emulator", "-o", "evaluation",
        "--limit", "4")  # fmt: skip
    systems = json.loads((tmp_path / "evaluation" / "results.json").read_text())["systems"]
    assert set(systems) == {"base", "emulator"}
    assert all(system["nll"] > 0 for system in systems.values())
