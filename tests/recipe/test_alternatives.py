"""Several emulators in one recipe: which rows each may see, and which LoRA the rest starts from."""

import json
from pathlib import Path

import pytest

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.held_out import mean_loss
from emloc_core.data.rows import CALIBRATION, SELECTION, load_rows
from emloc_core.data.tokenize import Limits, encode, load_processing
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.documents import read_json
from emloc_core.files.output import MANIFEST, made_from
from emloc_core.model.skeleton import Skeleton
from emloc_core.plugins.manager import plugin_manager
from emloc_core.recipe.page import RunView, write_page
from emloc_core.recipe.recipe import Recipe, load_recipe
from emloc_core.recipe.stages import kept, rest, stages

RECIPE = """
output = "run"
[model]
base = "{base}"
[data]
train = "{rows}"
[compress]
samples = 8
selection = 6
[alternatives.small]
ratio = 0.2
samples = 12
[alternatives.levels]
kind = "2.7-bit"
samples = 8
[train]
steps = 3
batch_size = 2
bf16 = false
learning_rate = 1e-2
"""


@pytest.fixture
def write(tmp_path, tiny_model, rows_file):
    """Write the recipe with more at its end, and return it as it is read."""

    def write(more: str = "", *overrides: str) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(base=tiny_model, rows=rows_file) + more)
        return load_recipe(path, overrides)

    return write


def keys(*paths: Path) -> set[str]:
    return {row.key for path in paths for row in load_rows(str(path))}


def record(recipe: Recipe, **losses: float) -> None:
    """Write what a correction records, for the LoRA of every emulator."""
    for name, loss in losses.items():
        chosen = {"clamp": 0, "scale": 1.15}
        candidates = [{"clamp": 0, "scale": 1.0, "nll": 9.0}, {**chosen, "nll": loss}]
        directory = Path(recipe.output) / name
        directory.mkdir(parents=True)
        (directory / MANIFEST).write_text(json.dumps({"result": {**chosen, "candidates": candidates}}))


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
    assert kept(recipe).name == ""
    record(recipe, corrected_levels=0.4)
    assert kept(recipe).name == "small"
    polish, merge = (stage.request for stage in rest(recipe))
    assert polish.adapter.name == "corrected_small"
    assert merge.adapter.name == "polished"
    assert [path.parent.name for path in polish.exclude] == ["emulator_small", "emulator"]


@pytest.mark.parametrize(
    ("more", "overrides", "said"),
    [
        ("", ["correct.clamp=3"], "alternatives are compared by correct.clamp = 'auto'"),
        ("", ["alternatives.small.selection=4"], "alternatives.small.selection has no use"),
        ("", ["model.memory='1GiB'"], "model.memory and alternatives.small.ratio both set the emulator's size"),
        ('[alternatives."../up"]\nratio = 0.3\n', [], "alternatives"),
        ("", ["alternatives.small.ration=0.3"], "'alternatives.small.ration'. Did you mean 'ratio'?"),
    ],
)
def test_what_contradicts_itself_is_refused_before_any_stage(write, more, overrides, said):
    with pytest.raises(EmlocError, match=said.replace("?", r"\?")):
        write(more, *overrides)


@pytest.mark.usefixtures("calls_here")
def test_a_run_judges_all_on_rows_that_none_has_seen(emloc, write, tmp_path):
    recipe = write()
    run = tmp_path / "run"
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--json")
    assert code == 0, err
    results = json.loads(out)
    losses = results["selection_losses"]
    assert set(losses) == {"corrected", "corrected_small", "corrected_levels"}
    assert len(set(losses.values())) == 3
    assert results["kept"] == min(losses, key=losses.__getitem__)

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
    skeleton = Skeleton(base, family, "cpu")
    rows = load_rows(str(run / "emulator" / SELECTION))
    limits = Limits.of(skeleton.model.config)
    samples = encode(rows, load_processing(base.directory, family, rows), None, limits, skeleton.dtype)
    for name, loss in losses.items():
        assert mean_loss(skeleton, family, samples, Adapter(run / name).loras) == pytest.approx(loss, abs=2e-6)
    assert Path(made_from(run / "merged", "adapter")).name == results["kept"]

    view = RunView.read(run)
    ending = results["kept"].removeprefix("corrected")
    sizes = read_json(run / f"emulator{ending}" / MANIFEST)["result"]["bytes"]
    assert view.bytes == (sizes["base"], sizes["emulator"])
    assert all(stage.planned for stage in view.stages)
    page = write_page(run, tmp_path / "page.html").read_text()
    assert page.count("kept</td>") == 1

    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    code, out, _ = emloc("run", tmp_path / "recipe.toml")
    assert code == 0
    assert f"{results['kept']} is kept" in out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == stamps
