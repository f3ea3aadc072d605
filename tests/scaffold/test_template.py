"""Plugins from `emloc families new`: what it writes is sound, and a stranger's family goes all the way with it."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from support.models import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_core.cli import cli
from emloc_core.errors import EmlocError
from emloc_core.scaffold.package import write_plugin

#: How StarCoder2 differs from the template: its MLP has no gate.
STARCODER2_GROUPS = {'["mlp.gate_proj", "mlp.up_proj"]': '["mlp.c_fc"]', '["mlp.down_proj"]': '["mlp.c_proj"]'}
FILES = ["README.md", "emloc_{0}/__init__.py", "pyproject.toml", "tests/test_family.py"]


def new(*argv):
    """Run `emloc families new`; return what it prints."""
    argv = ["families", "new", *map(str, argv)]
    return CliRunner().invoke(cli, argv, catch_exceptions=False).output


def lint(directory):
    """Run ruff on a rendered package, with its own settings and those rules that find most faults."""
    for command in (["check", "--extend-select", "I,B,UP,D1,ANN,RUF"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", str(directory)]
        process = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout


def test_a_new_package_is_complete_and_clean(tmp_path):
    directory = tmp_path / "plugin"
    report = json.loads(new("my_model", "--model-type", "gemma", "--model-type", "olmo2", "-o", directory, "--json"))
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    assert report["files"] == files == sorted(name.format("my_model") for name in FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["plugin"]
    assert 'MODEL_TYPES = ["gemma", "olmo2"]' in (directory / "emloc_my_model" / "__init__.py").read_text()
    assert "{{" not in "".join(path.read_text() for path in directory.rglob("*") if path.is_file())
    lint(directory)


def test_the_next_steps_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = new("my_model").splitlines()
    assert lines[:4] == sorted(f"emloc-my-model/{name.format('my_model')}" for name in FILES)
    assert [line.strip() for line in lines[-3:]] == [
        "pip install --editable emloc-my-model",
        "emloc families check my_model",
        "pytest emloc-my-model",
    ]
    assert "  pip install --editable 'my plugin'" in new("my_model", "-o", "my plugin").splitlines()
    assert "model_type`: `my_model`" in (tmp_path / "emloc-my-model" / "README.md").read_text()


def test_a_declaration_can_come_from_a_model(tmp_path):
    AutoConfig.for_model("starcoder2").save_pretrained(tmp_path)
    new("my_coder", "--from", tmp_path, "-o", tmp_path / "plugin")
    lint(tmp_path / "plugin")
    source = (tmp_path / "plugin" / "emloc_my_coder" / "__init__.py").read_text()
    module = ModuleType("emloc_my_coder")
    exec(source, module.__dict__)
    (family,) = module.emloc_families()
    assert family is module.MY_CODER
    assert (family.name, family.model_types) == ("my_coder", {"starcoder2"})
    assert ["mlp.c_fc"] in family.towers[0].input_groups
    assert "from emloc_my_coder import MY_CODER\n" in (tmp_path / "plugin" / "tests" / "test_family.py").read_text()


@pytest.mark.parametrize(
    ("name", "types", "message"),
    [
        ("my-model", [], "'my-model' cannot be part of a Python package's name"),
        ("modèle", [], "cannot be part"),
        ("mine_", [], "cannot be part"),
        ("llama", ["starcoder2"], "A plugin or family 'llama' is already installed"),
        ("demo", ["starcoder2"], "A plugin or family 'demo' is already installed"),
        ("core", ["starcoder2"], "There is already a package emloc_core"),
        ("template", ["starcoder2"], "There is already a package emloc_template"),
        ("mine", ["starcoder2", "qwen2"], "'qwen' declares qwen2 already"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(tmp_path, name, types, message):
    with pytest.raises(EmlocError, match=message):
        write_plugin(name, tmp_path / "plugin", types)
    assert not list(tmp_path.iterdir())


def test_other_model_types_than_the_model_s_get_tiny_configs_of_their_own(tmp_path):
    AutoConfig.for_model("starcoder2").save_pretrained(tmp_path)
    types = ("--model-type", "mine", "--model-type", "starcoder2")
    new("my_coder", "--from", tmp_path, *types, "-o", tmp_path / "plugin")
    module = ModuleType("emloc_my_coder")
    exec((tmp_path / "plugin" / "emloc_my_coder" / "__init__.py").read_text(), module.__dict__)
    assert module.MY_CODER.model_types == {"mine", "starcoder2"}
    assert [config["model_type"] for config in module.MY_CODER.tiny_configs] == ["mine", "starcoder2"]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EmlocError, match="plugin cannot be written: Not a directory"):
        write_plugin("mine", tmp_path / "file" / "plugin")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_killed_run_has_left_is_no_part_of_the_package(tmp_path):
    partial = tmp_path / ".plugin.partial" / "content"
    partial.mkdir(parents=True)
    (partial / "half.py").write_text("half")
    files = write_plugin("mine", tmp_path / "plugin")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {f"plugin/{name}" for name in files}


def test_nothing_is_overwritten(tmp_path):
    write_plugin("mine", tmp_path / "plugin")
    readme = tmp_path / "plugin" / "README.md"
    readme.write_text("mine")
    with pytest.raises(EmlocError, match="already exists"):
        write_plugin("mine", tmp_path / "plugin")
    assert readme.read_text() == "mine"


@pytest.fixture(scope="module")
def environment(new_environment):
    """A virtual environment with emloc's wheel, in which strangers' plugins are installed."""
    return new_environment()


@pytest.mark.slow
def test_the_tests_of_a_new_package_pass_where_the_model_is_laid_out_as_llama(environment, tmp_path):
    environment.run("emloc", "families", "new", "olmo", "--model-type", "olmo2", "-o", "plugin", cwd=tmp_path)
    lint(tmp_path / "plugin")
    output = environment.run("python", "-m", "pytest", "-p", "no:cacheprovider", cwd=tmp_path / "plugin")
    assert "passed" in output
    assert "skipped" not in output


@pytest.fixture(scope="module")
def starcoder2(environment, tmp_path_factory):
    """The package of a family that is not in the tree, from the template; its wheel is installed."""
    directory = tmp_path_factory.mktemp("starcoder2") / "emloc-starcoder2"
    environment.run("emloc", "families", "new", "starcoder2", "-o", directory, cwd=directory.parent)
    module = directory / "emloc_starcoder2" / "__init__.py"
    source = module.read_text()
    for llama, starcoder2 in STARCODER2_GROUPS.items():
        assert source.count(llama) == 1
        source = source.replace(llama, starcoder2)
    module.write_text(source)
    lint(directory)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(directory / "dist"), str(directory)], check=True)
    (wheel,) = (directory / "dist").glob("emloc_starcoder2-*.whl")
    environment.install(wheel)
    return module


@pytest.fixture(scope="module")
def starcoder2_model(environment, starcoder2, tmp_path_factory) -> Path:
    """A saved tiny StarCoder2, of the family's own tiny config, with a tokenizer."""
    script = "import json, emloc_starcoder2; print(json.dumps(emloc_starcoder2.STARCODER2.tiny_configs[0]))"
    settings = json.loads(environment.run("python", "-c", script, cwd=starcoder2.parent.parent.parent))
    return save_tiny_model(settings, tmp_path_factory.mktemp("models") / "tiny-starcoder2")


@pytest.mark.thorough
def test_a_declaration_is_short(starcoder2):
    assert len([line for line in starcoder2.read_text().splitlines() if line.strip()]) <= 40


@pytest.mark.thorough
@pytest.mark.usefixtures("starcoder2")
def test_a_strangers_family_passes_the_conformance_kit(environment, tmp_path):
    listed = json.loads(environment.run("emloc", "families", "--json", cwd=tmp_path))
    assert {
        "name": "starcoder2",
        "distribution": "emloc-starcoder2",
        "families": ["starcoder2"],
        "error": None,
    } in listed["plugins"]
    checked = json.loads(environment.run("emloc", "families", "check", "starcoder2", "--json", cwd=tmp_path))
    assert checked["passed"]
    assert {check["config"] for check in checked["checks"]} == {"all", "starcoder2"}


@pytest.mark.thorough
def test_a_strangers_family_goes_all_the_way(environment, starcoder2_model, rows_file, tmp_path):
    """All stages, in one process of the environment: each would take seconds to import the same libraries again."""
    base, rows = ("--base", starcoder2_model), ("--data", rows_file)
    small = ("--kind", "low-rank", "--samples", 12, "--selection", 6)
    tuning = ("--steps", 3, "--batch-size", 2, "--lr", 1e-3, "--no-bf16")
    commands = [
        ("compress", starcoder2_model, *rows, *small, "-o", "emulator"),
        ("train", "emulator", *rows, *tuning, "-o", "adapter"),
        ("correct", "adapter", *base, "--clamp", 3, "-o", "corrected"),
        ("merge", "corrected", *base, "-o", "merged"),
        ("eval", "--new-task", "completion_nll", *rows, "-o", "task.yaml"),
        ("eval", "task.yaml", "--emulator", "emulator", "--merged", "merged", "--limit", 4, "-o", "evaluation"),
    ]
    script = "import json, sys; from emloc_core.cli import cli\nfor argv in json.loads(sys.argv[1]):\n    "
    script += "cli.main(argv, standalone_mode=False)"
    argv = json.dumps([list(map(str, command)) for command in commands])
    environment.run("python", "-c", script, argv, cwd=tmp_path)

    linears = json.loads((tmp_path / "emulator" / "emloc.json").read_text())["result"]["linears"]
    kinds = {linear["path"].rpartition(".")[2] for linear in linears if linear["rank"]}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"}
    original = AutoModelForCausalLM.from_pretrained(starcoder2_model, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = original(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(original, tmp_path / "corrected")(input_ids=ids).logits
        assert torch.allclose(merged(input_ids=ids).logits, tuned, atol=1e-5)
    assert not torch.allclose(plain, tuned, atol=1e-3)
    systems = json.loads((tmp_path / "evaluation" / "results.json").read_text())["systems"]
    assert set(systems) == {"emulator", "merged"}
    assert all(system["nll"] > 0 for system in systems.values())
