"""Broken plugins: every command still works, the listing says what is wrong, and strict mode ends every command."""

import json
import sys
import textwrap

import pytest
from click.testing import CliRunner
from support.plugins import BROKEN, RAISING_OBSERVER
from support.run import patch_calls

from emloc_core.cli import cli
from emloc_core.errors import EmlocError
from emloc_core.plugins.manager import plugin_manager

KINDS = ("import error", "wrong type", "no list of towers", "unknown hook", "raising hook")
#: Named so that they would be loaded before the plugins of the tree, if those did not come first.
SOURCES = {
    **{kind: BROKEN[kind] for kind in KINDS},
    "duplicate name": BROKEN["duplicate name"].replace('name="good"', 'name="llama"'),
    "duplicate model type": BROKEN["duplicate model type"].replace('{"good"}', '{"llama"}'),
}
ERRORS = {
    "import error": "ModuleNotFoundError: No module named 'no_such_module'",
    "wrong type": "TypeError: emloc_families returned str, not Family",
    "no list of towers": "TypeError: the family 'better' has towers = None. Input should be an instance of Sequence",
    "unknown hook": "TypeError: there is no hook 'emloc_familys'. Did you mean 'emloc_families'?",
    "raising hook": "RuntimeError: out of order",
    "duplicate name": "ValueError: the family 'llama' is already declared",
    "duplicate model type": "ValueError: 'llama' already declares the model types ['llama']",
}
SMALL = ("--samples", "8", "--selection", "4")


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    """A function that installs plugins from their sources, as pip does, for commands that run in this process."""
    with pytest.MonkeyPatch.context() as patch:

        def install(**sources):
            site = tmp_path_factory.mktemp("site")
            information = site / "aaa_stranger-1.0.dist-info"
            information.mkdir()
            (information / "METADATA").write_text("Metadata-Version: 2.1\nName: aaa-stranger\nVersion: 1.0\n")
            names = {name: f"{name}_of_{site.name}" for name in sources}
            for name, source in sources.items():
                (site / f"{names[name]}.py").write_text(textwrap.dedent(source))
            entries = [f"{name} = {module}" for name, module in names.items()]
            (information / "entry_points.txt").write_text("\n".join(["[emloc]", *entries]))
            patch.syspath_prepend(site)
            plugin_manager.cache_clear()
            return site

        yield install
    plugin_manager.cache_clear()


@pytest.fixture(scope="module")
def stages(install, shallow_model, rows_file, tmp_path_factory):
    """Every stage's output for a tiny model, with all broken plugins installed, and an observer that raises."""
    sources = {f"aaa_{index}": source for index, source in enumerate(SOURCES.values())}
    sys_path = list(sys.path)
    install(**sources, aaa_observer=RAISING_OBSERVER)
    directory = tmp_path_factory.mktemp("stages")
    recipe = directory / "recipe.toml"
    recipe.write_text(f'output = "run"\n[model]\nbase = "{shallow_model}"\n[data]\ntrain = "{rows_file}"\n')
    base, rows = ("--base", shallow_model), ("--data", rows_file)
    tuning = ("--steps", "1", "--batch-size", "2", "--no-bf16")
    outputs = [
        run("compress", shallow_model, *rows, *SMALL, "-o", directory / "emulator"),
        run("train", directory / "emulator", *rows, *tuning, "-o", directory / "adapter"),
        run("correct", directory / "adapter", *base, "-o", directory / "corrected"),
        run("merge", directory / "corrected", *base, "-o", directory / "merged"),
        run("plan", shallow_model, "--device", "cpu", "--memory", "4GiB", "--ratio", "0.5", "--length", "16"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch_calls(patch)
        assert "emulator" in run("run", recipe, "--dry-run")
    assert (directory / "merged" / "model.safetensors").is_file()
    assert sum(output.count("'aaa_observer' of aaa-stranger is broken") for output in outputs) == 1
    reports = [report for report in plugin_manager().reports if report.name.startswith("aaa_")]
    assert len(reports) == len(sources) + 1
    assert all(report.error for report in reports)
    sys.path[:] = sys_path
    plugin_manager.cache_clear()
    return directory


@pytest.fixture
def commands(stages, shallow_model, rows_file, tmp_path):
    """Every command, as it is used, without the work that takes long."""
    task = tmp_path / "task.yaml"
    base, rows, dry = ("--base", shallow_model), ("--data", rows_file), ("--dry-run", "-o", tmp_path / "output")
    return [
        ("families",),
        ("families", "new", "phi9", "-o", tmp_path / "plugin"),
        ("compress", shallow_model, *rows, *SMALL, *dry),
        ("train", stages / "emulator", *rows, *dry),
        ("correct", stages / "adapter", *base, *dry),
        ("merge", stages / "corrected", *base, *dry),
        ("eval", "--new-task", "completion_nll", *rows, "-o", task),
        ("eval", task, *base, "--emulator", stages / "emulator", *dry),
        *(("families", name, "--help") for name in ("check", "scaffold")),
        *((name, "--help") for name in cli.list_commands(None)),
    ]


def run(*argv):
    """Run a command to its end; return what it prints on either stream."""
    outcome = CliRunner().invoke(cli, [str(argument) for argument in argv], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.fixture
def broken(request, install):
    """The kind of the broken plugin that is installed."""
    path = list(sys.path)
    install(aaa=SOURCES[request.param])
    yield request.param
    sys.path[:] = path
    plugin_manager.cache_clear()


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(name, marks=() if name in ("import error", "raising hook") else pytest.mark.thorough)
        for name in SOURCES
    ],
    indirect=True,
)
def test_every_command_works_beside_a_broken_plugin(broken, commands):
    for argv in commands:
        assert run(*argv)
    listed = json.loads(run("families", "--json"))
    assert {"internvl", "llama", "qwen"} <= {family["name"] for family in listed["families"]}
    error = ERRORS[broken]
    assert {plugin["name"]: plugin["error"] for plugin in listed["plugins"] if plugin["error"]} == {"aaa": error}
    assert f"plugin aaa (aaa-stranger): BROKEN: {error}" in run("families").splitlines()


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("broken", ["import error"], indirect=True)
def test_strict_ends_every_command(commands, monkeypatch):
    monkeypatch.setenv("EMLOC_STRICT_PLUGINS", "1")
    for argv in commands:
        plugin_manager.cache_clear()
        with pytest.raises(EmlocError, match="The plugin 'aaa' of aaa-stranger is broken"):
            run(*argv)
