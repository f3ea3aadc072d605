"""Plugins: found, isolated when they are broken, reported."""

import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint

import pytest

from emloc_core import algorithms, hookspecs
from emloc_core.errors import EmlocError
from emloc_core.plugins import PluginManager, plugin_manager

GOOD = """
    from emloc_core.family import Family, Tower
    from emloc_core.hookspecs import hookimpl

    @hookimpl
    def emloc_families():
        tower = Tower(name="language", blocks="model.layers", input_groups=[["mlp.up_proj"]])
        return [Family(name="good", model_types=frozenset({"good"}), towers=[tower])]
"""
BROKEN = {
    "import error": "import no_such_module",
    "syntax error": "def (",
    "wrong type": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_families():
            return ["llama"]
    """,
    "duplicate name": GOOD.replace('{"good"}', '{"better"}'),
    "duplicate model type": GOOD.replace('name="good"', 'name="better"'),
    "unknown hook": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_familys():
            return []
    """,
    "raising hook": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_families():
            raise RuntimeError("out of order")
    """,
    "wrong argument": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_families(config):
            return []
    """,
}


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
    good, broken = entry(GOOD), entry(BROKEN[kind])
    manager.load([good, broken])
    reports = {report.name: report for report in manager.reports}
    assert reports[good.name].families == ("good",)
    assert reports[broken.name].error
    assert [family.name for family in manager.families()] == ["good"]
    manager.hook.emloc_families()  # the broken one is not called


@pytest.mark.parametrize("kind", BROKEN)
def test_strict_raises(entry, kind, monkeypatch):
    monkeypatch.setenv("EMLOC_STRICT_PLUGINS", "1")
    with pytest.raises(EmlocError, match="is broken"):
        PluginManager().load([entry(GOOD), entry(BROKEN[kind])])


def test_a_misspelt_hook_is_told_its_name(entry):
    manager = PluginManager()
    manager.load([entry(BROKEN["unknown hook"])])
    assert "Did you mean 'emloc_families'?" in manager.reports[0].error


def test_the_family_of_a_model_type_or_what_to_do():
    assert plugin_manager().family_for("llama").name == "llama"
    with pytest.raises(EmlocError, match=r"No installed family declares the model type 'gpt9'.*llama.*docs/plugins"):
        plugin_manager().family_for("gpt9")


def test_algorithms_come_by_name_through_the_hooks():
    manager = PluginManager()
    manager.register(algorithms)
    for hook, name in (("rank_allocators", "uniform"), ("factorizers", "activation-svd"), ("corrections", "emloc")):
        assert callable(manager.algorithm(hook, name))
    with pytest.raises(EmlocError, match="Did you mean 'uniform'"):
        manager.algorithm("rank_allocators", "unifrom")


def test_every_hook_is_documented():
    hooks = [value for name, value in vars(hookspecs).items() if name.startswith("emloc_")]
    assert len(hooks) == 7
    assert all(hook.__doc__ for hook in hooks)


@pytest.mark.parametrize("command", [["--help"], ["families"], ["compress", "--help"], ["run", "--help"]])
def test_help_and_listing_import_no_torch(command):
    code = (
        "import sys; sys.argv = ['emloc', *sys.argv[1:]]\n"
        "from emloc_core.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    sys.stderr.write('heavy: ' + str({'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "heavy: set()" in done.stderr
