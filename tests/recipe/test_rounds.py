"""Rounds of a recipe: a LoRA is tuned on one emulator after another, each fitted with the LoRA so far."""

import json
import re
from pathlib import Path

import pytest

from emloc_core.adapters.enclosed import enclosed_in
from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json
from emloc_core.files.manifest import MANIFEST, input_name
from emloc_core.recipe.page import write_page
from emloc_core.recipe.recipe import Recipe, load_recipe
from emloc_core.recipe.stages import compress_request, stages
from emloc_core.recipe.view import RunView

RECIPE = """
output = "run"
rounds = 2
[model]
base = "{base}"
[data]
train = "{rows}"
[compress]
samples = 8
selection = 6
[train]
steps = 5
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


def test_every_round_has_its_stages_and_the_last_has_the_usual_names(write):
    recipe = write()
    in_order = stages(recipe)
    assert [stage.name for stage in in_order] == [
        "emulator_round1", "adapter_round1", "corrected_round1", "emulator", "adapter", "corrected",
        "merged",
    ]  # fmt: skip
    assert in_order[3].purpose == "make the emulator, round 2 of 2"
    requests = {stage.name: stage.request for stage in in_order}
    assert requests["emulator_round1"].adapter is None
    assert requests["emulator"].adapter == requests["corrected_round1"].output
    assert compress_request(recipe) == requests["emulator_round1"]


@pytest.mark.parametrize(("steps", "rounds", "shares"), [(5, 2, [2, 3]), (60, 3, [20, 20, 20])])
def test_rounds_share_the_steps_and_see_other_rows_first(write, steps, rounds, shares):
    recipe = write("", f"train.steps={steps}", f"rounds={rounds}")
    tuning = [stage.request.settings for stage in stages(recipe) if stage.request.stage == "train"]
    assert [settings.steps for settings in tuning] == shares
    assert [settings.seed for settings in tuning] == [*range(rounds)]


@pytest.mark.parametrize(("line", "epochs"), [("epochs = 2", 1), ("", 1.5)])
def test_rounds_share_the_epochs(tmp_path, write, line, epochs):
    write()
    path = tmp_path / "recipe.toml"
    path.write_text(path.read_text().replace("steps = 5", line))
    tuning = [stage.request.settings for stage in stages(load_recipe(path)) if stage.request.stage == "train"]
    assert [(settings.steps, settings.epochs) for settings in tuning] == [(None, epochs)] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["way='lora'"], "rounds are tuned on emulators, but way is 'lora'"),
        (["train.objective=dpo"], "a second round supports only the likelihood of answers"),
        (["train.lora_experts=true"], "only LoRAs on Linears"),
        (["train.steps=1"], "train.steps = 1 are fewer than rounds = 2"),
    ],
)
def test_what_contradicts_itself_is_refused_before_any_stage(write, overrides, message):
    with pytest.raises(EmlocError, match=re.escape(message)):
        write("", *overrides)


@pytest.mark.usefixtures("calls_here")
def test_a_run_trains_one_lora_on_both_emulators(emloc, write, tmp_path):
    write()
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--json")
    assert code == 0, err
    results, run = json.loads(out), tmp_path / "run"
    assert results["final"] == "merged"
    second = read_json(run / "adapter" / MANIFEST)
    assert Path(input_name(run / "adapter", "model")) == run / "emulator"
    assert second["result"]["steps"] == 3
    first = (run / "corrected_round1" / "adapter_model.safetensors").read_bytes()
    assert (enclosed_in(run / "emulator") / "adapter_model.safetensors").read_bytes() == first
    names = ("selection.jsonl", "calibration.jsonl")
    assert all((run / "emulator" / name).read_text() == (run / "emulator_round1" / name).read_text() for name in names)

    card = (run / "merged" / "README.md").read_text()
    assert card.count("fitted with the LoRA so far") == 1
    last = read_json(run / "corrected" / MANIFEST)["result"]["candidates"][0]
    assert f"| {last['clamp']} | {last['scale']:g} | {last['nll']:.4f} |" in card

    view = RunView.read(run)
    assert [stage.name for stage in view.stages] == [
        "emulator_round1", "adapter_round1", "corrected_round1", "emulator", "adapter", "corrected", "merged",
    ]  # fmt: skip
    assert all(stage.planned for stage in view.stages)
    page = write_page(run, tmp_path / "page.html").read_text()
    assert "adapter_round1" in page

    code, _, err = emloc("run", tmp_path / "recipe.toml")  # all is there
    assert code == 0, err
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--dry-run")
    assert code == 0, err
    assert "round 2 of 2" in out
