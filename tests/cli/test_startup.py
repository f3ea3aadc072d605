"""Commands that need no model, and users' errors, import nothing heavy, with every plugin of the tree loaded."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.marks import thorough

from emloc_core.plugins.builtin import ALGORITHMS
from emloc_core.plugins.manager import plugin_manager

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "lm_eval", "numpy", "matplotlib", "accelerate")
#: Runs each line of stdin (directory, variables, command) in a fork of a process that imported the command line alone.
SCRIPT = f"""
import json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from emloc_core.cli import main
for line in sys.stdin:
    reader, writer = os.pipe()
    if os.fork() == 0:
        cwd, environment, *sys.argv[1:] = json.loads(line)
        os.chdir(cwd)
        os.environ.update(environment)
        code, out, err = 0, StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
        heavy = [name for name in {HEAVY} if name in sys.modules]
        with open(writer, "w") as told:
            json.dump([code, heavy, out.getvalue().splitlines(), err.getvalue()], told)
        os._exit(0)
    os.close(writer)
    with open(reader) as told:
        print(told.read(), flush=True)
    os.wait()
"""


@pytest.fixture(scope="module")
def starter() -> Iterator[subprocess.Popen[str]]:
    """A process whose forks stand for new processes."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def run(starter, tmp_path) -> Callable[..., tuple[int, list[str], list[str], str]]:
    """A function that returns a command's exit code, the heavy packages that it imported, and what it printed."""

    def run(*command: str, cwd: Path = tmp_path, **environment: str):
        starter.stdin.write(json.dumps([str(cwd), environment, *command]) + "\n")
        starter.stdin.flush()
        return json.loads(starter.stdout.readline())

    return run


@pytest.mark.parametrize(
    "command",
    ["--help", "--version", "families", "families --json", "train --help", "zoo list", "zoo show SmolLM2-135M",
     "zoo plan --help"],
)  # fmt: skip
def test_nothing_heavy_is_imported(command, run):
    code, heavy, answer, _ = run(*command.split())
    assert (code, heavy) == (0, [])
    assert answer


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_model: Path) -> Path:
    """A directory with a model, one of an unknown type, rows, and a recipe."""
    root: Path = tmp_path_factory.mktemp("errors")
    (root / "model").symlink_to(tiny_model)
    (root / "odd").mkdir()
    (root / "odd" / "config.json").write_text('{"model_type": "odd"}')
    (root / "empty.jsonl").touch()
    (root / "rows.jsonl").write_text('{"text": "a"}\n')
    (root / "recipe.toml").write_text('[model]\nbase = "model"\nmemory = "1GB"\n[data]\ntrain = "rows.jsonl"\n')
    return root


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan odd", "No installed family declares the model type 'odd'"),
        ("compress odd --data rows.jsonl -o o", "'odd'"),
        ("train missing --data rows.jsonl -o o", "There is no model at missing"),
        ("compress model --data rows.jsonl -o odd", "odd exists and was not written by emloc"),
        ("compress model --data rows.jsonl -o rows.jsonl/o", "rows.jsonl is not a directory"),
        ("correct missing -o o", "There is no directory missing"),
        ("polish missing --data rows.jsonl -o o", "There is no directory missing"),
        ("merge missing -o o", "There is no directory missing"),
        ("export missing -o o", "There is no model at missing"),
        ("import missing -o o", "There is no model at missing"),
        ("chat missing", "There is no model at missing"),
        ("run recipe.toml --set train.setps=3", "Did you mean 'steps'?"),
        ("zoo plan odd", "No entry of the registry is called 'odd'"),
        *thorough(
            ("plan Qwen-14B", "Did you mean 'Qwen3-14B'?"),
            ("plan model --memory 12", "Write the unit"),
            ("plan model --batch-size 0", "batch_size = 0"),
            ("plan model --kind six-bit", "'six-bit' among the emulators: low-rank"),
            ("plan model --data none.jsonl", "There is no file none.jsonl"),
            ("compress missing --data rows.jsonl -o o", "There is no model at missing"),
            ("compress model --data none.jsonl:2 --data rows.jsonl -o o", "There is no file none.jsonl"),
            ("compress model --data rows.jsonl --kind nf5 -o o", "Did you mean 'nf4'?"),
            ("compress model --data rows.jsonl --allocator even -o o", "allocator"),
            ("compress model --data rows.jsonl --memory 3hours -o o", "is not a memory size"),
            ("train model --data none.jsonl -o o", "There is no file none.jsonl"),
            ("train model --data empty.jsonl -o o", "empty.jsonl holds no rows"),
            ("run recipe.toml --dry-run --set model.memory=12q", "is not a memory size"),
            ("run recipe.toml --dry-run --set model.base=odd", "'odd'"),
            ("run recipe.toml --set data.train=none.jsonl", "There is no file"),
        ),
    ],
)  # fmt: skip
def test_an_error_of_the_users_is_told_before_anything_heavy_is_imported(command, message, directory, run):
    code, heavy, _, stderr = run(*command.split(), cwd=directory)
    assert code == 1
    assert message in stderr
    assert heavy == []


@pytest.mark.parametrize("hook", ALGORITHMS)
def test_the_built_in_algorithms_are_known_by_name_without_torch(hook):
    builtin = plugin_manager().get_plugin("emloc_core")
    provided = getattr(builtin, f"emloc_{hook}")()
    assert set(ALGORITHMS[hook]) == set(provided)
    assert all(getattr(algorithm, "name", name) == name for name, algorithm in provided.items())


def test_a_command_that_is_misspelt_is_named(run):
    code, heavy, _, stderr = run("polsh", "x")
    assert (code, heavy) == (2, [])
    assert "No such command 'polsh'. Did you mean 'polish'?" in stderr


@pytest.mark.thorough
def test_a_plan_of_what_was_planned_before_imports_no_transformers(directory, tmp_path, run):
    command = ["plan", "model", "--memory", "1GB", "--no-measure", "--json"]
    first, again = (run(*command, cwd=directory, EMLOC_CACHE=str(tmp_path)) for _ in range(2))
    code, heavy, answer, _ = again
    assert "transformers" in first[1]
    assert (code, heavy) == (0, ["torch", "numpy"])
    assert answer == first[2]
