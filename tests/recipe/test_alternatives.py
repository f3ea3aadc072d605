"""Several emulators in one recipe: which rows each may see, and which LoRA the rest starts from."""

import json
import re
from pathlib import Path

import pytest

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.held_out import summed_loss
from emloc_core.data.limits import Limits
from emloc_core.data.rows import CALIBRATION, SELECTION, load_rows
from emloc_core.data.tokenize import encode, load_processing
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.documents import read_json
from emloc_core.files.manifest import MANIFEST, input_name
from emloc_core.model.opened import OpenModel
from emloc_core.plugins.manager import plugin_manager
from emloc_core.recipe.page import write_page
from emloc_core.recipe.recipe import Recipe, load_recipe
from emloc_core.recipe.stages import attempts, final_stages, kept, stages
from emloc_core.recipe.view import RunView

RECIPE = """
output = "run"
[model]
base = "{base}"
[data]
train = "{rows}"
[compress]
samples = 8
selection = 6
max_length = 64
[alternatives.small]
ratio = 0.2
samples = 12
[alternatives.levels]
kind = "trellis"
samples = 8
[train]
steps = 3
batch_size = 2
bf16 = false
learning_rate = 1e-2
"""


@pytest.fixture
def write(tmp_path, shallow_model, rows_file):
    """Write the recipe with more at its end, and return it as loaded."""

    def write(more: str = "", *overrides: str) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(base=shallow_model, rows=rows_file) + more)
        return load_recipe(path, overrides)

    return write


def keys(*paths: Path) -> set[str]:
    return {row.key for path in paths for row in load_rows(str(path))}


def record(recipe: Recipe, **losses: float) -> None:
    """Write what a correction records, for the LoRA of every emulator."""
    for name, loss in losses.items():
        directory = Path(recipe.output) / name
        directory.mkdir(parents=True)
        (directory / MANIFEST).write_text(json.dumps({"kind": "corrected-adapter", "result": {"nll": loss}}))


def test_every_emulator_has_its_stages_and_the_rest_is_done_once(write):
    names = [stage.name for stage in stages(write("[polish]\nsteps = 2\n"))]
    assert names == [
        "emulator", "adapter", "corrected",
        "emulator_small", "adapter_small", "corrected_small",
        "emulator_levels", "adapter_levels", "corrected_levels",
        "polished", "merged",
    ]  # fmt: skip


def test_the_lora_that_serves_the_base_best_is_kept_once_all_are_known(write):
    recipe = write("[polish]\nsteps = 2\n")
    record(recipe, corrected=0.5, corrected_small=0.3)
    assert kept(recipe).name == "compress"
    record(recipe, corrected_levels=0.4)
    assert kept(recipe).name == "small"
    polish, merge = (stage.request for stage in final_stages(recipe))
    assert polish.adapter.name == "corrected_small"
    assert merge.adapter == polish.output
    assert (polish.output.name, merge.output.name) == ("polished_small", "merged_small")
    assert [path.parent.name for path in polish.exclude] == ["emulator_small", "emulator"]


def test_all_are_judged_on_the_same_tokens(write):
    first, *others = attempts(write("loss = 'all'\n"))
    assert (first.settings.max_length, first.settings.loss) == (64, "all")
    for other in others:
        assert (other.settings.max_length, other.settings.loss, other.settings.selection) == (64, "all", 0)


def test_a_lora_without_its_loss_is_told(write):
    recipe = write()
    record(recipe, corrected=0.5)
    (Path(recipe.output) / "corrected" / MANIFEST).write_text('{"kind": "corrected-adapter", "result": {}}')
    with pytest.raises(EmlocError, match=r"corrected/emloc\.json has no result\.nll"):
        stages(recipe)


@pytest.mark.parametrize(
    ("more", "overrides", "message"),
    [
        ("", ["correct.clamp=3"], "alternatives are compared by correct.clamp = 'auto'"),
        ("", ["train.objective=dpo"], "says little about preferences"),
        ("", ["compress.selection=0"], "holds out none; hold some out."),
        ("", ["alternatives.small.selection=4"], "set compress.selection"),
        ("", ["alternatives.small.max_length=9"], "set compress.max_length"),
        ("", ["model.memory='1GiB'"], "model.memory and alternatives.small.ratio both set the emulator's size"),
        ("[alternatives.again]\nsamples = 8\n", [], "alternatives.again is the same emulator as compress"),
        ('[alternatives."../up"]\nratio = 0.3\n', [], "alternatives.../up: choose a name of letters"),
        ("[alternatives.compress]\nratio = 0.3\n", [], "alternatives.compress: choose a name of letters"),
        ("", ["alternatives.small.ration=0.3"], "'alternatives.small.ration'. Did you mean 'ratio'?"),
    ],
)
def test_what_contradicts_itself_is_refused_before_any_stage(write, more, overrides, message):
    with pytest.raises(EmlocError, match=re.escape(message)):
        write(more, *overrides)


@pytest.mark.usefixtures("calls_here")
def test_rows_to_tune_on_are_counted_in_their_own_file(emloc, write, tmp_path, rows_file):
    lines = rows_file.read_text().splitlines(keepends=True)
    for name, some in (("few", lines[:30]), ("most", lines[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    write()
    own = ("data.calibration=few.jsonl", "data.train=most.jsonl", "alternatives={}")
    options = [part for value in own for part in ("--set", value)]
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--dry-run", "--json", *options)
    assert code == 0, err
    assert json.loads(out)["rows"] == {"calibration": 8, "selection": 6, "tuning": 90}


@pytest.mark.usefixtures("calls_here")
def test_what_is_wrong_with_an_alternative_is_said_before_anything_is_made(emloc, write, tmp_path):
    write()
    for command in (["run"], ["run", "--dry-run"]):
        code, _, err = emloc(*command, tmp_path / "recipe.toml", "--set", "alternatives.levels.kind=2.7bit")
        assert code == 1
        assert "2.7bit" in err
    assert not (tmp_path / "run").exists()
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--dry-run", "--json")
    assert code == 0, err
    preview = json.loads(out)
    assert preview["rows"] == {"calibration": 8, "selection": 6, "tuning": 106}
    assert set(preview["alternatives"]) == {"small", "levels"}
    assert preview["alternatives"]["levels"]["emulator_bytes"] < preview["emulator_bytes"]


@pytest.mark.usefixtures("calls_here")
def test_what_is_in_the_way_of_an_alternative_names_it_and_the_way_without(emloc, write, tmp_path):
    write()
    output = tmp_path / "run" / "emulator_levels"
    output.mkdir(parents=True)
    (output / "notes.txt").write_text("mine")
    for more in ([], ["--dry-run"]):
        code, _, err = emloc("run", tmp_path / "recipe.toml", *more)
        assert code != 0
        assert "The alternative 'levels': " in err
        assert str(output) in err
        assert "set alternatives = {}" in err
    assert not (tmp_path / "run" / "emulator").exists()


@pytest.mark.usefixtures("calls_here")
def test_a_run_judges_all_on_rows_that_none_has_seen(emloc, write, tmp_path):
    recipe = write("[polish]\nsteps = 1\nbatch_size = 2\nbf16 = false\n")
    run = tmp_path / "run"
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--json")
    assert code == 0, err
    results = json.loads(out)
    losses = results["selection_losses"]
    assert set(losses) == {"compress", "small", "levels"}
    assert len(set(losses.values())) == 3
    assert results["kept"] == min(losses, key=losses.__getitem__)
    assert results["kinds"] == {"compress": "nf4", "small": "low-rank", "levels": "trellis"}
    ends = {"compress": "", "small": "_small", "levels": "_levels"}

    judged = keys(run / "emulator" / SELECTION)
    assert len(judged) == 6
    for name in ("_small", "_levels"):
        assert not judged & keys(run / f"emulator{name}" / CALIBRATION)
        tuned = read_json(run / f"adapter{name}" / MANIFEST)["result"]
        calibrated = len(keys(run / f"emulator{name}" / CALIBRATION))
        assert tuned["rows"] == 120 - 6 - calibrated

    # The losses are those of the base with what was written.
    base = Checkpoint(Path(recipe.model.base))
    family = plugin_manager().family_for(base.config)
    skeleton = OpenModel(base, family).skeleton
    rows = load_rows(str(run / "emulator" / SELECTION))
    limits = Limits.for_config(skeleton.model.config)
    samples = encode(rows, load_processing(base.directory, family, rows), None, limits, skeleton.dtype)
    for name, loss in losses.items():
        loras = Adapter(run / f"corrected{ends[name]}").loras
        total, tokens = summed_loss(skeleton, samples, loras).tolist()
        assert total / tokens == pytest.approx(loss, abs=2e-6)
    end = ends[results["kept"]]
    assert results["final"] == f"merged{end}"
    assert Path(input_name(run / f"merged{end}", "adapter")).name == f"polished{end}"
    polished = read_json(run / f"polished{end}" / MANIFEST)["result"]
    assert polished["excluded_rows"] == 6 + len(keys(run / f"emulator{end}" / CALIBRATION))

    view = RunView.read(run)
    sizes = read_json(run / f"emulator{end}" / MANIFEST)["result"]["bytes"]
    assert view.bytes == (sizes["base"], sizes["emulator"])
    assert all(stage.planned for stage in view.stages if not stage.name.startswith("polished"))
    page = write_page(run, tmp_path / "page.html").read_text()
    assert page.count("kept</td>") == 1
    assert '<td data-label="Kind">trellis</td>' in page

    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    code, out, _ = emloc("run", tmp_path / "recipe.toml")
    assert code == 0
    assert f"kept: {results['kept']}" in out
    assert f"levels (trellis) {losses['levels']:.4f}" in out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == stamps


@pytest.mark.usefixtures("calls_here")
@pytest.mark.thorough
def test_an_alternative_may_be_added_to_a_finished_run(emloc, write, tmp_path):
    write()
    alone = ["--set", "alternatives={}"]
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--json", *alone)
    assert code == 0, err
    assert json.loads(out)["final"] == "merged"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--json", "--set", "alternatives={other={ratio=0.9}}")
    assert code == 0, err
    results = json.loads(out)
    assert set(results["selection_losses"]) == {"compress", "other"}
    assert (tmp_path / "run" / results["final"] / MANIFEST).is_file()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
