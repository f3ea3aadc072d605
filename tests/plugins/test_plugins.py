"""Plugins: found, isolated when they are broken, reported."""

import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.paths import DOCS
from support.plugins import BROKEN, COMMAND, GOOD, RAISING_OBSERVER

from emloc_core.algorithms.correction import correct_lora
from emloc_core.cli import cli
from emloc_core.errors import EmlocError
from emloc_core.family import Family, Tower
from emloc_core.plugins import builtin as algorithms
from emloc_core.plugins import manager as plugins
from emloc_core.plugins.manager import STRICT, PluginManager, plugin_manager

BROKEN_ALGORITHMS = {
    "raising": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_corrections():
            import no_such_module
    """,
    "duplicate name": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_corrections():
            return {"emloc": lambda *_: "another one", "more": print}
    """,
    "not callable": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_corrections():
            return {"more": "print"}
    """,
    "no mapping": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_corrections():
            return [print]
    """,
}
OTHER_ALGORITHM = """
    from emloc_core.hookspecs import hookimpl

    @hookimpl
    def emloc_corrections():
        return {"other": print}
"""
OBSERVER = """
    from emloc_core.hookspecs import hookimpl

    SEEN = []

    @hookimpl
    def emloc_block_done(path, index):
        SEEN.append((path, index))
"""
BLOCK = {"stage": "compress", "path": "model.layers.0", "total": 2}


@pytest.fixture
def entry(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    count = iter(range(100))

    def make(source):
        name = f"plugin_under_test_{tmp_path.name}_{next(count)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return EntryPoint(name, name, "emloc")

    return make


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_listed_with_its_error_and_breaks_nothing(entry, kind):
    manager = PluginManager()
    good, command, broken = entry(GOOD), entry(COMMAND), entry(BROKEN[kind])
    manager.load([good, command, broken])
    reports = {report.name: report for report in manager.reports}
    assert reports[good.name].families == ("good",)
    assert {name for name, report in reports.items() if report.error} == {broken.name}
    assert [family.name for family in manager.families()] == ["good"]
    assert manager.commands() == {"hello": sys.modules[command.value].command}
    assert not manager.has_plugin(broken.name)


@pytest.mark.parametrize("kind", BROKEN)
def test_strict_raises(entry, kind, monkeypatch):
    monkeypatch.setenv("EMLOC_STRICT_PLUGINS", "1")
    with pytest.raises(EmlocError, match="is broken"):
        PluginManager().load([entry(GOOD), entry(COMMAND), entry(BROKEN[kind])])


def test_a_wrong_type_is_told_with_the_place_it_stands_at(entry):
    manager = PluginManager()
    manager.load([entry(BROKEN["wrong type of a tower's groups"]), entry(GOOD.replace("frozenset", "set"))])
    error = "TypeError: the family 'better' has towers.0.input_groups.0 = 'q_proj'. "
    assert manager.reports[0].error.startswith(error)
    assert manager.reports[1].families == ("good",)


def test_a_name_of_a_plugin_that_is_taken_is_told_in_a_line(entry):
    manager = PluginManager()
    first, other = entry(GOOD), entry(COMMAND)
    manager.load([first, EntryPoint(first.name, other.value, "emloc"), EntryPoint("zzz", first.value, "emloc")])
    error = f"ValueError: a plugin {first.name!r} is already loaded"
    assert [report.error for report in manager.reports] == [None, error, error]
    assert [family.name for family in manager.families()] == ["good"]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("unknown hook", "there is no hook 'emloc_familys'. Did you mean 'emloc_families'?"),
        ("unmarked hook", "emloc_families is not marked @hookimpl (from emloc_core.hookspecs import hookimpl)"),
        ("a single family", "emloc_families returned Family, not a list"),
        ("a single command", "emloc_commands returned Command, not a list"),
    ],
)
def test_what_is_wrong_with_a_hook_is_told_by_its_name(entry, kind, error):
    manager = PluginManager()
    manager.load([entry(BROKEN[kind])])
    assert manager.reports[0].error == f"TypeError: {error}"


def test_the_family_of_a_model_type_or_what_to_do(monkeypatch):
    monkeypatch.setenv(STRICT, "1")
    assert plugin_manager().family_for({"model_type": "llama"}).name == "llama"
    with pytest.raises(EmlocError, match="No installed family declares the model type 'granite'") as raised:
        plugin_manager().family_for({"model_type": "granite"})
    assert "transformers" not in str(raised.value)
    for part in ("llama (llama, mistral)", "`emloc families scaffold MODEL`", "`emloc families new NAME`"):
        assert part in str(raised.value)


@pytest.mark.parametrize("strict", ["0", "1"])
def test_no_plugin_is_advised_for_a_model_that_has_classes_of_its_own(monkeypatch, strict):
    monkeypatch.setenv(STRICT, strict)
    config = {"model_type": "chatglm", "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}}
    with pytest.raises(EmlocError, match="'chatglm', and transformers has no such model type") as raised:
        plugin_manager().family_for(config)
    assert "never run: use a version of the model in transformers' own classes" in raised.value.fix
    assert "emloc families" not in raised.value.fix


@pytest.mark.parametrize("loaded", [False, True])
def test_the_model_types_of_transformers_are_known_before_it_is_imported(loaded):
    code = "import transformers.models.auto\n" if loaded else ""
    code += "from emloc_core.compat.model_types import has_model_type as has\n"
    code += "import sys\nprint(has('granite'), has('chatglm'), 'transformers' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["True", "False", str(loaded)]


def test_algorithms_come_by_name_through_the_hooks():
    manager = PluginManager()
    manager.register(algorithms)
    for hook, name in (("emulators", "nf4"), ("corrections", "emloc")):
        assert callable(manager.algorithm(hook, name))
    with pytest.raises(EmlocError, match="Did you mean 'low-rank'"):
        manager.algorithm("emulators", "low-rnak")


@pytest.mark.parametrize("kind", BROKEN_ALGORITHMS)
def test_broken_algorithms_are_skipped_and_reported(entry, kind, capsys):
    manager = PluginManager()
    manager.register(algorithms, name="emloc_core")
    broken, good = entry(BROKEN_ALGORITHMS[kind]), entry(OTHER_ALGORITHM)
    manager.load([broken, good])
    assert [report.error for report in manager.reports] == [None, None]  # nothing has been asked for
    for _ in range(2):
        assert manager.algorithm("corrections", "emloc") is correct_lora
        assert manager.algorithm("corrections", "other") is print
    with pytest.raises(EmlocError, match="There is no 'more'"):
        manager.algorithm("corrections", "more")
    reports = {report.name: report for report in manager.reports}
    assert {name for name, report in reports.items() if report.error} == {broken.name}
    error = capsys.readouterr().err
    assert error.count(f"the plugin {broken.name!r} of unknown is broken: {reports[broken.name].error}") == 1
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("kind", BROKEN_ALGORITHMS)
def test_strict_raises_for_broken_algorithms(entry, kind, monkeypatch):
    monkeypatch.setenv("EMLOC_STRICT_PLUGINS", "1")
    manager = PluginManager()
    manager.register(algorithms, name="emloc_core")
    manager.load([entry(BROKEN_ALGORITHMS[kind])])
    with pytest.raises(EmlocError, match="is broken"):
        manager.algorithm("corrections", "emloc")


def test_a_raising_observer_disturbs_nothing_and_is_told_once(entry, capsys):
    manager = PluginManager()
    raising, seeing = entry(RAISING_OBSERVER), entry(OBSERVER)
    manager.load([raising, seeing])
    for index in range(2):
        manager.notify("emloc_block_done", **BLOCK, index=index)
    assert sys.modules[seeing.value].SEEN == [("model.layers.0", 0), ("model.layers.0", 1)]
    assert capsys.readouterr().err.splitlines() == [
        f"emloc: the plugin {raising.name!r} of unknown is broken: RuntimeError: cannot observe compress"
    ]
    assert "cannot observe" in manager.reports[0].error


@pytest.mark.parametrize("hook", ["emloc_block_done", "emloc_corrections", "emloc_registry"])
def test_a_hook_that_leaves_the_program_does_not(entry, hook, capsys):
    manager = PluginManager()
    manager.register(algorithms, name="emloc_core")
    leaving = entry(f"""
        import sys
        from emloc_core.hookspecs import hookimpl

        @hookimpl
        def {hook}():
            sys.exit(3)
    """)
    manager.load([leaving])
    manager.notify("emloc_block_done", **BLOCK, index=0)
    assert manager.algorithm("corrections", "emloc") is correct_lora
    assert list(manager.registries()) == []
    assert capsys.readouterr().err == f"emloc: the plugin {leaving.name!r} of unknown is broken: SystemExit: 3\n"


def test_an_observer_cannot_change_what_it_observes(entry):
    manager = PluginManager()
    manager.load([entry("""
        from emloc_core.hookspecs import hookimpl

        @hookimpl
        def emloc_stage_done(manifest):
            manifest["result"].clear()
    """)])  # fmt: skip
    manifest = {"result": {"bytes": 1}}
    manager.notify("emloc_stage_done", stage="merge", output=Path("merged"), manifest=manifest)
    assert manifest == {"result": {"bytes": 1}}
    assert manager.reports[0].error is None


def test_a_raising_observer_raises_when_strict(entry, monkeypatch):
    monkeypatch.setenv("EMLOC_STRICT_PLUGINS", "1")
    manager = PluginManager()
    manager.load([entry(RAISING_OBSERVER)])
    with pytest.raises(EmlocError, match="is broken"):
        manager.notify("emloc_block_done", **BLOCK, index=0)


def test_the_command_line_has_the_commands_of_plugins_that_work(entry, monkeypatch):
    manager = PluginManager()
    manager.load([entry(BROKEN["raising commands"]), entry(COMMAND)])
    monkeypatch.setattr(plugins, "plugin_manager", lambda: manager)
    listed = CliRunner().invoke(cli, ["--help"], catch_exceptions=False).output
    assert "hello" in listed
    assert "compress" in listed
    assert CliRunner().invoke(cli, ["hello"], catch_exceptions=False).output == "hello there\n"


def test_hook_calls_are_traced(entry, monkeypatch, capsys):
    monkeypatch.setenv("EMLOC_TRACE_PLUGINS", "1")
    manager = PluginManager()
    good, broken, seeing = entry(GOOD), entry(BROKEN["raising hook"]), entry(OBSERVER)
    manager.load([good, broken, seeing])
    manager.notify("emloc_block_done", **BLOCK, index=0)
    trace = capsys.readouterr().err
    assert "emloc_block_done [hook]" in trace
    assert "path: model.layers.0" in trace
    finished = [line for line in trace.splitlines() if "finish emloc_families --> [[Family(" in line]
    assert len(finished) == 1  # the one that raises does not
    assert "name='good'" in finished[0]


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_traced_or_raised_unless_asked_for(entry, value, monkeypatch, capsys):
    for variable in ("EMLOC_TRACE_PLUGINS", "EMLOC_STRICT_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
        if value is not None:
            monkeypatch.setenv(variable, value)
    PluginManager().load([entry(GOOD), entry(BROKEN["wrong type"])])
    assert capsys.readouterr() == ("", "")


def test_a_plugin_with_a_broken_entry_is_listed_as_broken(entry, emloc, monkeypatch, tmp_path):
    (tmp_path / "broken.toml").write_text('id = "me/model"\nno_such_field = 1\n')
    source = f"""
        from emloc_core.hookspecs import hookimpl

        @hookimpl
        def emloc_registry():
            return [{str(tmp_path / "broken.toml")!r}]
    """
    manager = PluginManager()
    manager.load([entry(source)])
    for module in ("plugins.manager", "registry.registry"):
        monkeypatch.setattr(f"emloc_core.{module}.plugin_manager", lambda: manager)
    code, out, _ = emloc("families")
    assert code == 0
    assert f"plugin {manager.reports[0].name} (unknown): BROKEN: " in out
    assert "broken.toml" in out


def test_a_path_is_not_taken_for_a_list_of_letters(entry):
    manager = PluginManager()
    source = """
        from emloc_core.hookspecs import hookimpl

        @hookimpl
        def emloc_registry():
            return "entries/model.toml"
    """
    manager.load([entry(source)])
    assert list(manager.registries()) == []
    assert manager.reports[0].error == "TypeError: emloc_registry returned str, not a list"


DOCUMENTED, FORMATS = ((DOCS / page).read_text() for page in ("plugins.md", "formats.md"))


def test_the_plugins_of_the_documentation_work(entry, capsys):
    manager = PluginManager()
    examples = re.findall(r"```python\n(.*?)```", DOCUMENTED + FORMATS, re.DOTALL)
    assert len(examples) == 5
    manager.load([entry(source) for source in examples])
    assert [report.error for report in manager.reports] == [None] * 5
    assert [family.name for family in manager.families()] == ["my_llama"]
    manager.notify("emloc_block_done", **BLOCK, index=0)
    assert capsys.readouterr().out == "model.layers.0 is done, 1 of 2\n"


def test_every_check_is_documented():
    from emloc_core.conformance.checks import EACH, WHOLE

    rows = re.findall(r"^\| `([\w-]+)` \| \S", DOCUMENTED, re.MULTILINE)
    assert sorted(rows) == sorted(check.name for check in (*WHOLE, *EACH))


def test_every_field_is_documented():
    for declared in (Family, Tower):
        documented = re.findall(r"^    (\w+): ", inspect.getdoc(declared).partition("Attributes:")[2], re.MULTILINE)
        assert sorted(documented) == sorted(field.name for field in dataclasses.fields(declared))


@pytest.mark.parametrize(
    "command", [["--help"], ["families"], ["families", "new", "--help"], ["compress", "--help"], ["run", "--help"]]
)
def test_help_and_listing_import_no_torch(command):
    code = (
        "import sys; sys.argv = ['emloc', *sys.argv[1:]]\n"
        "from emloc_core.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    sys.stderr.write('heavy: ' + str({'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)))\n"
    )
    process = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "heavy: set()" in process.stderr
