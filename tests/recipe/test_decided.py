"""What is decided for a recipe that names a memory; where evidence is divided, both kinds are tried."""

import json
from pathlib import Path

import pytest
from support.marks import thorough

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json
from emloc_core.files.manifest import MANIFEST
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import make_workload
from emloc_core.recipe.decided import decided
from emloc_core.recipe.recipe import Recipe, load_recipe
from emloc_core.recipe.stages import stages
from emloc_core.settings import CompressSettings, TrainSettings

RECIPE = """
output = "run"
[model]
base = "{base}"
memory = "{memory}"
headroom = "0"
[data]
train = "{rows}"
[compress]
samples = 8
selection = 6
[train]
steps = 2
batch_size = 1
bf16 = false
learning_rate = 1e-2
"""


def need(base: Path, rows: Path, kind: str | None, ratio: float, **other: str) -> int:
    """Return the bytes that tuning an emulator, or the base itself, takes on the rows of the recipe."""
    config = base / "config.json"
    train = TrainSettings(steps=2, batch_size=1, bf16=False, learning_rate=1e-2, **other)
    model = MemoryModel(config, make_workload(config, train, data=str(rows)), CompressSettings(kind=kind or "nf4"))
    return model.tuning(model.plan(ratio) if kind else None).total


@pytest.fixture
def write(tmp_path, shallow_model, rows_file):
    """Write the recipe for the memory that an emulator takes, and return it as loaded."""

    def write(kind: str | None = "trellis", ratio: float = 0.5, overrides=(), **other) -> Recipe:
        memory = need(shallow_model, rows_file, kind, ratio, **other)
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(base=shallow_model, rows=rows_file, memory=memory))
        return load_recipe(path, overrides)

    return write


@pytest.mark.usefixtures("calls_here")
@pytest.mark.parametrize(
    ("kind", "ratio"),
    [("nf4", 0.5), ("trellis", 0.5), *thorough(("low-rank-nf4", 0.4), ("low-rank-2-bit", 0.3))],
)
def test_the_best_kind_that_fits_is_made(write, kind, ratio):
    recipe = decided(write(kind, ratio))
    assert [stage.name for stage in stages(recipe)] == ["emulator", "adapter", "corrected", "merged"]
    assert (recipe.way, recipe.model.memory, recipe.compress.kind) == ("emulator", None, kind)
    assert Recipe(**recipe.model_dump(exclude_unset=True)) == decided(recipe) == recipe
    assert decided(write(kind, ratio, ["compress.kind='auto'"])).compress == recipe.compress


@pytest.mark.usefixtures("calls_here")
def test_an_ordinary_lora_is_trained_where_it_fits(emloc, write, tmp_path, capsys):
    recipe = decided(write(None))
    assert [stage.name for stage in stages(recipe)] == ["adapter", "merged"]
    assert stages(recipe)[0].request.model == recipe.model.base
    assert "so: train an ordinary LoRA on the model" in capsys.readouterr().err
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--dry-run", "--json")
    assert code == 0, err
    assert (json.loads(out)["way"], "emulator_bytes" in json.loads(out)) == ("lora", False)
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--json")
    assert code == 0, err
    assert set(json.loads(out)["stages"]) == {"adapter", "merged"}
    assert json.loads(out)["final"] == "merged"


@pytest.mark.usefixtures("calls_here")
def test_no_exact_steps_follow_an_ordinary_lora(write, capsys):
    recipe = decided(write(None, overrides=["polish.steps=2"]))
    assert [stage.name for stage in stages(recipe)] == ["adapter", "merged"]
    assert "[polish] is left out" in capsys.readouterr().err


@pytest.mark.usefixtures("calls_here")
def test_exact_steps_alone_are_a_way_too(emloc, write, tmp_path):
    write(None)
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--set", "way=exact", "--json")
    assert code == 0, err
    assert set(json.loads(out)["stages"]) == {"adapter", "merged"}
    request = read_json(tmp_path / "run" / "adapter" / MANIFEST)["request"]
    assert request["exact"] is True
    code, _, err = emloc("run", tmp_path / "recipe.toml", "--set", "way=exact", "--set", "polish.steps=2")
    assert code != 0
    assert "polish follows an emulator's LoRA" in err


@pytest.mark.usefixtures("calls_here")
@pytest.mark.parametrize("override", ["compress.kind='nf4'", "compress.calibration='base'", "way=emulator"])
def test_whoever_says_how_the_emulator_is_made_gets_one_even_where_none_is_needed(write, override):
    assert decided(write(None, overrides=[override])).way == "emulator"


@pytest.mark.usefixtures("calls_here")
def test_an_emulator_of_a_kind_gets_the_largest_ratio_that_fits(write):
    assert 0.5 <= decided(write("low-rank", 0.5, ["compress.kind='low-rank'"])).compress.ratio < 0.6


def test_a_part_of_a_key_may_be_quoted(write):
    recipe = write(overrides=['train.rank_pattern."layers.1"=4', "train.rank_pattern.q_proj=2"])
    assert recipe.train.rank_pattern == {"layers.1": 4, "q_proj": 2}
    for wrong in ("#=1", "a..b=1", "a b=1", '"a=1', "=1"):
        with pytest.raises(EmlocError, match="is not a setting"):
            write(overrides=[wrong])
