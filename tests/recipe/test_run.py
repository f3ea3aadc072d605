"""A whole run: which rows each stage may see, what it leaves, and what a second run does."""

import json
from pathlib import Path

import pytest

from emloc_core.data.rows import CALIBRATION, SELECTION, load_rows
from emloc_core.files.documents import read_json
from emloc_core.files.manifest import MANIFEST, input_name
from emloc_core.recipe.page import write_page
from emloc_core.recipe.view import RunView

RECIPE = """
output = "run"
[model]
base = "{base}"
[data]
train = "{rows}"
[compress]
kind = "trellis"
samples = 8
selection = 6
max_length = 64
[train]
steps = 3
batch_size = 2
bf16 = false
learning_rate = 1e-2
[polish]
steps = 1
batch_size = 2
bf16 = false
"""


@pytest.fixture
def recipe(tmp_path, shallow_model, rows_file):
    """The recipe's file."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(base=shallow_model, rows=rows_file))
    return path


def keys(*paths: Path) -> set[str]:
    return {row.key for path in paths for row in load_rows(str(path))}


@pytest.mark.usefixtures("calls_here")
def test_rows_to_tune_on_are_counted_in_their_own_file(emloc, recipe, tmp_path, rows_file):
    lines = rows_file.read_text().splitlines(keepends=True)
    for name, some in (("few", lines[:30]), ("most", lines[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    options = ["--set", "data.calibration=few.jsonl", "--set", "data.train=most.jsonl"]
    code, out, err = emloc("run", recipe, "--dry-run", "--json", *options)
    assert code == 0, err
    assert json.loads(out)["rows"] == {"calibration": 8, "selection": 6, "tuning": 90}


@pytest.mark.usefixtures("calls_here")
def test_what_is_wrong_with_the_emulator_is_said_before_anything_is_made(emloc, recipe, tmp_path):
    for command in (["run"], ["run", "--dry-run"]):
        code, _, err = emloc(*command, recipe, "--set", "compress.kind=2.7bit")
        assert code == 1
        assert "2.7bit" in err
    assert not list(tmp_path.glob("run/emulator*"))
    output = tmp_path / "run" / "emulator"
    output.mkdir(parents=True)
    (output / "notes.txt").write_text("mine")
    for more in ([], ["--dry-run"]):
        code, _, err = emloc("run", recipe, *more)
        assert code != 0
        assert str(output) in err


@pytest.mark.usefixtures("calls_here")
def test_a_run_holds_rows_out_and_is_not_repeated(emloc, recipe, tmp_path):
    run = tmp_path / "run"
    code, out, err = emloc("run", recipe, "--json")
    assert code == 0, err
    results = json.loads(out)
    assert set(results["stages"]) == {"emulator", "adapter", "corrected", "polished", "merged"}
    selected, calibrated = (keys(run / "emulator" / name) for name in (SELECTION, CALIBRATION))
    assert (len(selected), len(calibrated), selected & calibrated) == (6, 8, set())
    assert read_json(run / "adapter" / MANIFEST)["result"]["rows"] == 120 - 6 - 8
    assert read_json(run / "polished" / MANIFEST)["result"]["excluded_rows"] == 6 + 8
    assert results["final"] == "merged"
    assert Path(input_name(run / "merged", "adapter")).name == "polished"

    view = RunView.read(run)
    sizes = read_json(run / "emulator" / MANIFEST)["result"]["bytes"]
    assert view.bytes == (sizes["base"], sizes["emulator"])
    assert all(stage.planned for stage in view.stages)
    assert "trellis" in write_page(run, tmp_path / "page.html").read_text()

    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert emloc("run", recipe)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == stamps
