"""The command line: every mistake is one sentence on stderr, exit code 1, and leaves nothing behind."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rich_click as click
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.marks import thorough
from support.paths import DOCS
from support.rows import write_jsonl
from support.run import patch_calls, run_here

from emloc_core.cli import cli
from emloc_core.data.rows import CALIBRATION, SELECTION, load_rows
from emloc_core.errors import EmlocError
from emloc_core.recipe.recipe import load_recipe

SMALL = ["--samples", "8", "--selection", "4"]


@pytest.mark.parametrize(("path", "detail"), [((), ""), (("/a/b",), ": /a/b cannot be written")])
def test_a_full_disk_is_one_sentence_wherever_it_is_met(emloc, monkeypatch, path, detail):
    @click.command("write")
    def write():
        raise OSError(errno.ENOSPC, "No space left on device", *path)

    monkeypatch.setitem(cli.commands, "write", write)
    message = f"emloc: error: The disk is full{detail}. Free some space, and run the same command again.\n"
    assert emloc("write") == (1, "", message)


def change(model, tmp_path, **files):
    """A copy of a model with some files rewritten; None removes one."""
    copy = shutil.copytree(model, tmp_path / "model")
    for name, content in files.items():
        path = copy / name.replace("__", ".")
        path.unlink() if content is None else path.write_bytes(content)
    return copy


def truncated(model, tmp_path):
    content = (model / "model.safetensors").read_bytes()
    return change(model, tmp_path, model__safetensors=content[:-100])


def wrong_type(model, tmp_path):
    config = json.loads((model / "config.json").read_text()) | {"model_type": "bart"}
    return change(model, tmp_path, config__json=json.dumps(config).encode())


def without_a_tensor(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    copy = shutil.copytree(model, tmp_path / "model")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _, tmp: tmp / "nothing", "There is no model at"),
        (lambda _, tmp: tmp, "has no config.json"),
        (lambda model, tmp: change(model, tmp, config__json=b"{"), "is not valid JSON"),
        (lambda model, tmp: change(model, tmp, config__json=b"{}"), "has no model_type"),
        (
            lambda model, tmp: change(model, tmp, model__safetensors=None),
            "has neither model.safetensors nor model.safetensors.index.json: no weights in safetensors. Add them.",
        ),
        (truncated, "it is truncated"),
        (
            wrong_type,
            "No plugin declares the model type 'bart', and looking at it is not enough: 'bart' is an encoder-decoder",
        ),
        (without_a_tensor, "lacks 1 of the model's tensors (model.layers.2.mlp.down_proj.weight)"),
    ],
)
def test_bad_models(emloc, tiny_model, rows_file, tmp_path, make, message):
    model = make(tiny_model, tmp_path)
    code, out, err = emloc("compress", model, "--data", rows_file, "-o", tmp_path / "out", *SMALL)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "holds no rows"),
        ('{"prompt": "a", "completion": "b"}\n{"question": "a"}\n', "rows.jsonl, row 2"),
        ('{"prompt": "a", "completion": "b"}\nnot json\n', "rows.jsonl, row 2"),
        ('{"text": "only one"}\n', "12"),
        ('{"text": "' + "cat " * 400 + '"}\n' + "".join(f'{{"text": "cat {i}"}}\n' for i in range(40)), "256"),
    ],
)
def test_bad_data(emloc, tiny_model, tmp_path, rows, message):
    data = tmp_path / "rows.jsonl"
    data.write_text(rows)
    samples = ["--samples", "41", "--selection", "0"] if "400" in rows or len(rows) > 1000 else SMALL
    code, _, err = emloc("compress", tiny_model, "--data", data, "-o", tmp_path / "out", *samples)
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.2"])
def test_ratio_out_of_range(emloc, tiny_model, rows_file, tmp_path, ratio):
    code, _, err = emloc("compress", tiny_model, "--data", rows_file, "-o", tmp_path / "out", "--ratio", ratio)
    assert code == 1
    assert f"ratio = {float(ratio)}" in err


def test_debug_shows_the_traceback(emloc, tmp_path):
    with pytest.raises(EmlocError, match="nothing"):  # which Python shows with its traceback
        emloc("--debug", "merge", "nothing", "--base", "x", "-o", tmp_path / "o")


@pytest.mark.parametrize(("allocator", "slack"), [("uniform", 1), ("global", (32 + 64) * 4)])
def test_dry_run_makes_nothing_and_speaks_json(emloc, tiny_model, rows_file, tmp_path, allocator, slack):
    argv = ("compress", tiny_model, "--data", rows_file, "-o", tmp_path / "out", "--allocator", allocator, *SMALL)
    code, out, _ = emloc(*argv, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} <= {".emloc-hashes.json"}
    assert (plan["calibration_rows"], plan["selection_rows"], plan["tuning_rows"]) == (8, 4, 108)
    assert plan["emulator_bytes"] < plan["base_bytes"]
    assert "calibration: on the activations of the emulator so far" in emloc(*argv, "--dry-run")[1]
    emloc(*argv)
    shards = (tmp_path / "out").glob("*.safetensors")
    written = json.loads((tmp_path / "out" / "emloc.json").read_text())["result"]["bytes"]["emulator"]
    # Of `global`, ranks are known when the model is decomposed; it leaves less than one rank of the largest Linear.
    assert 0 <= plan["emulator_bytes"] - written < slack
    assert sum(path.stat().st_size for path in shards) >= plan["emulator_bytes"]


RECIPE = """
output = "run"
[model]
base = "{base}"
[data]
train = "{rows}"
test = ["test.jsonl"]
[compress]
samples = 8
selection = 6
[train]
steps = 3
batch_size = 2
bf16 = false
learning_rate = 1e-3
"""


def write_recipe(directory, base, rows):
    """Write a recipe whose test rows are half of the rows."""
    write_jsonl(directory / "test.jsonl", [json.loads(line) for line in rows.read_text().splitlines()[:60]])
    path = directory / "recipe.toml"
    path.write_text(RECIPE.format(base=base, rows=rows))
    return path


@pytest.fixture
def recipe(tiny_model, rows_file, tmp_path):
    return write_recipe(tmp_path, tiny_model, rows_file)


@pytest.fixture(scope="module", params=["here", *thorough("processes")])
def ran(request, tiny_model, rows_file, tmp_path_factory):
    """A recipe that has been run: in this process, and as a user runs it, every stage in a process of its own."""
    path = write_recipe(tmp_path_factory.mktemp("recipe"), tiny_model, rows_file)
    command = [sys.executable, "-m", "emloc_core", "run", str(path)]
    if request.param == "here":
        with pytest.MonkeyPatch.context() as patch:
            patch_calls(patch)
            done = run_here(command)
    else:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "CI": "true"})
    assert done.returncode == 0, done.stderr
    return path


def test_a_recipe_names_all_its_errors_at_once(emloc, recipe):
    text = recipe.read_text().replace("samples = 8", "sampels = 8").replace("steps = 3", "steps = -3")
    recipe.write_text(text.replace("[data]", "[date]"))
    code, _, err = emloc("run", recipe)
    assert code == 1
    for part in ("'compress.sampels'. Did you mean 'samples'?", "train.steps = -3", "data is missing",
                 "there is no setting 'date'. Did you mean 'data'?"):  # fmt: skip
        assert part in err, part


def test_overrides_and_relative_paths(recipe):
    shutil.copy(load_recipe(recipe).data.train, recipe.parent / "rows.jsonl")
    loaded = load_recipe(recipe, ["data.train=./rows.jsonl", "compress.ratio=0.3", "correct.clamp=none"])
    assert Path(loaded.data.train) == recipe.parent / "rows.jsonl"
    assert (loaded.compress.ratio, loaded.correct.clamp) == (0.3, "none")


def test_a_dry_run_says_which_stages_there_are_and_starts_no_process(emloc, recipe, monkeypatch):
    monkeypatch.setattr("emloc_core.processes.call.subprocess.Popen", None)
    code, out, _ = emloc("run", recipe, "--dry-run", "--json")
    assert code == 0
    assert [(stage["name"], stage["state"]) for stage in json.loads(out)["stages"]] == [
        ("emulator", "to do"), ("adapter", "to do"), ("corrected", "to do"), ("merged", "to do"),
    ]  # fmt: skip
    assert not (recipe.parent / "run").exists()


@pytest.mark.usefixtures("calls_here")
def test_run_does_everything_and_nothing_twice(emloc, ran):
    root = ran.parent / "run"
    results = json.loads((root / "results.json").read_text())
    assert set(results["stages"]) == {"emulator", "adapter", "corrected", "merged"}
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    code, out, _ = emloc("run", ran, "--json")
    assert code == 0
    assert json.loads(out)["correction"] == results["correction"]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == stamps
    code, _, err = emloc("run", ran, "--set", "train.steps=4")
    assert code == 1
    assert "settings.steps was 3 and is now 4" in err


def test_test_rows_of_a_recipe_are_in_no_other_set(ran):
    reported = {row.key for row in load_rows(str(ran.parent / "test.jsonl"))}
    for name in (CALIBRATION, SELECTION):
        assert not reported & {row.key for row in load_rows(str(ran.parent / "run" / "emulator" / name))}
    trained = json.loads((ran.parent / "run" / "adapter" / "emloc.json").read_text())["result"]
    assert (trained["rows"], trained["excluded_rows"]) == (120 - 60 - 8 - 6, 60 + 8 + 6)


def test_generated_pages_are_current(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import generate

    for path, page in generate.PAGES.items():
        assert path.read_text() == page(), f"{path.name} is out of date: run `make docs`"


def test_help_of_every_command():
    runner = CliRunner()
    names = cli.list_commands(None)
    assert {"compress", "train", "correct", "merge", "eval", "run", "families"} <= set(names)
    for name in names:
        result = runner.invoke(cli, [name, "--help"])
        assert result.exit_code == 0
        assert name in result.output


def test_the_families_are_listed_with_what_stays_dense_and_why(emloc):
    code, out, _ = emloc("families")
    assert code == 0
    assert "  model.layers.*.mlp.gate stays dense: small, and an error in it sends tokens to other experts" in out


def test_rows_of_a_file_are_never_tuned_on_when_excluded(emloc, tiny_model, rows_file, tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", [json.loads(line) for line in rows_file.read_text().splitlines()[:20]])
    code, out, _ = emloc(
        "train", tiny_model, "--data", rows_file, "-o", tmp_path / "a", "--exclude", test, "--dry-run", "--json"
    )
    assert code == 0
    assert (json.loads(out)["rows"], json.loads(out)["excluded_rows"]) == (100, 20)
