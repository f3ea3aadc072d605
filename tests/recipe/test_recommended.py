"""A recipe that gives a memory and no kind tries what evidence cannot decide between."""

import json
from pathlib import Path

import pytest

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json
from emloc_core.files.output import MANIFEST
from emloc_core.kinds.levels import SixLevels
from emloc_core.memory.budget import recommended
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import make_workload
from emloc_core.recipe.recipe import Recipe, load_recipe
from emloc_core.recipe.recommended import with_alternative
from emloc_core.recipe.stages import stages
from emloc_core.settings import CompressSettings, TrainSettings

RECIPE = """
output = "run"
[model]
base = "{base}"
memory = "{memory}"
[data]
train = "{rows}"
[compress]
samples = 8
selection = 6
[train]
steps = 2
batch_size = 2
bf16 = false
learning_rate = 1e-2
"""


def need(base: Path, rows: Path, kind: str | None, ratio: float) -> int:
    """Return the bytes that tuning an emulator, or the base itself, takes on the rows of the recipe."""
    config = base / "config.json"
    train = TrainSettings(steps=2, batch_size=2, bf16=False, learning_rate=1e-2)
    model = MemoryModel(config, make_workload(config, train, data=str(rows)), CompressSettings(kind=kind or "nf4"))
    return model.tuning(model.plan(ratio) if kind else None).total


@pytest.fixture
def write(tmp_path, shallow_model, rows_file):
    """Write the recipe for the memory that an emulator takes, and return it as it is read."""

    def write(kind: str | None = "2.7-bit", ratio: float = 0.5, overrides=()) -> Recipe:
        memory = need(shallow_model, rows_file, kind, ratio)
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(base=shallow_model, rows=rows_file, memory=memory))
        return load_recipe(path, overrides)

    return write


@pytest.mark.usefixtures("calls_here")
def test_the_second_best_is_tried_where_evidence_is_divided(write, capsys):
    recipe = with_alternative(write())
    assert [stage.name for stage in stages(recipe)] == [
        "emulator", "adapter", "corrected", "emulator_2.7-bit", "adapter_2.7-bit", "corrected_2.7-bit", "merged",
    ]  # fmt: skip
    assert recipe.alternatives == {"2.7-bit": CompressSettings(kind="2.7-bit", samples=8)}
    assert capsys.readouterr().err.endswith(
        "Evidence is divided between 1.6-bit+repair and 2.7-bit: both are tried. To make one, set compress.kind = "
        "'1.6-bit+repair'.\n"
    )
    assert Recipe(**recipe.model_dump(exclude_unset=True)) == with_alternative(recipe) == recipe
    assert with_alternative(write(overrides=["compress.kind='auto'"])).alternatives == recipe.alternatives


@pytest.mark.usefixtures("calls_here")
@pytest.mark.parametrize(
    ("kind", "ratio", "kinds"),
    [
        (None, 0.5, []),  # an ordinary LoRA fits
        ("nf4", 0.5, ["nf4"]),
        ("1.6-bit+repair", 0.25, ["1.6-bit+repair"]),  # six levels are a little larger
        ("low-rank-nf4", 0.2, ["low-rank-nf4"]),
    ],
)
def test_one_emulator_is_made_where_evidence_names_no_other_that_fits(write, kind, ratio, kinds):
    recipe = write(kind, ratio)
    assert recommended(stages(recipe)[0].request) == kinds
    assert with_alternative(recipe) == recipe


@pytest.mark.usefixtures("calls_here")
def test_an_alternative_that_cannot_be_used_here_is_not_tried(write, monkeypatch):
    monkeypatch.setattr(SixLevels, "is_usable", lambda _: False)
    assert recommended(stages(write())[0].request) == ["1.6-bit+repair"]


@pytest.mark.usefixtures("calls_here")
def test_what_is_wrong_with_an_alternative_names_it_and_the_way_without(emloc, write, tmp_path):
    write()
    there = tmp_path / "run" / "emulator_2.7-bit"
    there.mkdir(parents=True)
    (there / "notes.txt").write_text("mine")
    for more in ([], ["--dry-run"]):
        code, _, err = emloc("run", tmp_path / "recipe.toml", *more)
        assert code != 0
        assert "The alternative '2.7-bit': " in err
        assert str(there) in err
        assert "set alternatives = {}" in err
    assert not (tmp_path / "run" / "emulator").exists()


@pytest.mark.parametrize(
    "override",
    [
        "compress.kind='1.6-bit+repair'",
        "compress.refine=1",
        "compress.allocator='global'",
        "correct.clamp=3",
        "alternatives.own.kind='nf4'",
        "alternatives={}",
        "train.objective='dpo'",
    ],
)
def test_whoever_says_how_the_emulator_is_made_gets_it_alone(write, monkeypatch, override):
    monkeypatch.setattr("emloc_core.recipe.recommended.call", None)  # so that nothing is planned
    recipe = write(overrides=[override])
    assert with_alternative(recipe) == recipe


@pytest.mark.usefixtures("calls_here")
def test_a_run_of_an_open_kind_keeps_the_better_of_both(emloc, write, tmp_path):
    write()
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--dry-run", "--json")
    assert code == 0, err
    assert list(json.loads(out)["alternatives"]) == ["2.7-bit"]
    assert not (tmp_path / "run").exists()
    for _ in range(2):
        code, out, err = emloc("run", tmp_path / "recipe.toml", "--json")
        assert code == 0, err
        results = json.loads(out)
        assert set(results["selection_losses"]) == {"compress", "2.7-bit"}
        assert results["kept"] == min(results["selection_losses"], key=results["selection_losses"].__getitem__)
        kinds = [
            read_json(tmp_path / "run" / name / MANIFEST)["request"]["settings"]["kind"]
            for name in ("emulator", "emulator_2.7-bit")
        ]
        assert kinds == ["1.6-bit+repair", "2.7-bit"]


def test_a_part_of_a_key_may_be_quoted(write):
    recipe = write(overrides=['alternatives."2.7-bit".kind="2.7-bit"', 'alternatives."2.7-bit".samples=9'])
    assert recipe.alternatives == {"2.7-bit": CompressSettings(kind="2.7-bit", samples=9)}
    for wrong in ("#=1", "a..b=1", "a b=1", '"a=1', "=1"):
        with pytest.raises(EmlocError, match="is not a setting"):
            write(overrides=[wrong])
