"""``emloc tune``: plans, writes a recipe, runs it, and answers held-out rows before and after."""

import json
import os
from unittest.mock import Mock

import pytest
from datasets import Dataset, DatasetDict
from support.rows import write_jsonl

import emloc_core as emloc_api
from emloc_core.data.row import Row
from emloc_core.data.rows import EVALUATED, ROWS, load_rows
from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json
from emloc_core.files.manifest import MANIFEST
from emloc_core.memory.budget import Budget
from emloc_core.memory.decision import decide
from emloc_core.memory.workload import make_workload
from emloc_core.recipe.recipe import load_recipe
from emloc_core.recipe.tune import Tune, by_name
from emloc_core.settings import TrainSettings
from emloc_core.stages.precheck import check_rows

#: Settings of a tiny model's tuning.
QUICK = {"steps": 2, "batch_size": 1, "bf16": False, "learning_rate": 1e-2}
FLAGS = ("--steps", 2, "--batch-size", 1, "--no-bf16", "--lr", 1e-2)

pytestmark = pytest.mark.usefixtures("calls_here")


@pytest.fixture
def tight(shallow_model, rows_file):
    """A memory that fits an emulator, but no ordinary LoRA."""
    config = shallow_model / "config.json"
    workload = make_workload(config, TrainSettings(**QUICK), data=str(rows_file))
    return str(next(way.bytes for way in decide(config, workload, Budget(2**40)).ways if way.kind == "nf4"))


def test_an_ordinary_lora_where_it_fits(emloc, shallow_model, rows_file, tmp_path):
    out = tmp_path / "tuned"
    command = ("tune", shallow_model, "--data", rows_file, "-o", out, "--memory", "4GiB", *FLAGS)
    code, output, err = emloc(*command, "--dry-run")
    assert code == 0, err
    assert output.splitlines()[0].startswith("memory: 4.29 GB, of which 215 MB stay free; 1 row of up to 16 tokens")
    assert "so: train an ordinary LoRA on the model" in output
    assert "merged" not in output
    assert "rows: 115 tuning\n" in output  # five of 120 are held out
    assert not out.exists()
    code, output, err = emloc(*command)
    assert code == 0, err
    assert "so: train an ordinary LoRA on the model" in err
    assert read_json(out / "results.json")["answers"] == read_json(out / "answers.json")["answers"]
    held_out, answers = load_rows(str(out / "held_out.jsonl")), read_json(out / "answers.json")["answers"]
    assert [answer["prompt"] for answer in answers] == [row.prompt for row in held_out]
    assert len(answers) == 5
    assert all(set(answer) == {"prompt", "expected", "before", "after"} for answer in answers)
    assert any(answer["before"] != answer["after"] for answer in answers)
    assert read_json(out / "adapter" / MANIFEST)["result"]["rows"] == len(load_rows(str(rows_file))) - 5
    assert (out / "report.html").is_file()
    card = (out / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "adapter")' in card
    assert "- LoRA: rank 8" in card
    assert "- `recipe.toml`: what was decided" in card
    assert not (out / "merged").exists()
    assert f"emloc chat {out / 'adapter'}" in output


def test_one_row_is_too_few_and_that_is_said_at_once(emloc, shallow_model, rows_file, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text(rows_file.read_text().splitlines()[0] + "\n")
    code, _, err = emloc("tune", shallow_model, "--data", one, "-o", tmp_path / "tuned", "--memory", "4GiB", *FLAGS)
    assert code == 1
    assert "There is only one distinct row" in err
    assert not (tmp_path / "tuned").exists()


def test_an_emulator_where_it_does_not_and_the_second_run_says_what_is_there(
    emloc, shallow_model, rows_file, tight, tmp_path, monkeypatch
):
    caps = []
    monkeypatch.setattr("emloc_core.stages.perform.keep_to_cap", lambda: caps.append(os.environ["EMLOC_MEMORY_CAP"]))
    out = tmp_path / "tuned"
    command = ("tune", shallow_model, "--data", rows_file, "-o", out, "--memory", tight, "--headroom", 0, *FLAGS)
    code, output, err = emloc(*command, "--merge", "--json", "--dry-run")
    assert code == 0, err
    rows = json.loads(output)["rows"]
    code, output, err = emloc(*command, "--merge", "--json")
    assert code == 0, err
    assert read_json(out / "adapter" / MANIFEST)["result"]["rows"] == rows["tuning"]
    assert caps == [f"cuda={tight}"] * 4
    assert set(json.loads(output)["stages"]) == {"emulator", "adapter", "corrected", "merged"}
    recipe = load_recipe(out / "recipe.toml")
    assert (recipe.way, recipe.compress.kind, recipe.model.memory) == ("emulator", "nf4", None)
    text = (out / "recipe.toml").read_text()
    assert "# so: make the emulator" in text
    assert "[data.columns]" not in text
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/emloc.json")}
    code, output, err = emloc(*command, "--merge")
    assert code == 0, err
    assert "recipe.toml exists: resuming that run" in err
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/emloc.json")} == before
    code, _, err = emloc(*command)
    assert code != 0
    assert "merge was true and is now false" in err
    code, _, err = emloc("run", out / "recipe.toml", "--dry-run")
    assert code == 0, err
    for override, message in {
        "train.lora_rank=4": f"{out / 'adapter'} exists and was made from something else: lora_rank was 8 and is now 4",
        "correct.clamp=3": f"{out / 'corrected'} exists and was made from something else: clamp was",
    }.items():
        code, _, err = emloc("run", out / "recipe.toml", "--dry-run", "--set", override)
        assert code == 1
        assert message in err


def test_a_split_that_cannot_be_is_refused_before_anything_is_written(emloc, shallow_model, rows_file, tmp_path):
    command = ("tune", shallow_model, "--data", rows_file, "-o", tmp_path / "tuned", "--memory", "4GiB", *FLAGS)
    code, _, err = emloc(*command, "--eval-split", "5%")
    assert code == 1
    assert f"{rows_file} is a file, which has no split '5%'" in err
    assert not (tmp_path / "tuned").exists()


def test_a_request_that_is_no_object_is_damaged(emloc, shallow_model, rows_file, tmp_path):
    (tmp_path / "recipe.toml").touch()
    (tmp_path / "tune.json").write_text("[]")
    code, _, err = emloc("tune", shallow_model, "--data", rows_file, "-o", tmp_path)
    assert code == 1
    assert "tune.json holds a list, not an object" in err


@pytest.mark.thorough
def test_rows_to_evaluate(emloc, shallow_model, rows_file, tmp_path):
    out = tmp_path / "tuned"
    command = ("tune", shallow_model, "--data", rows_file, "-o", out, "--memory", "4GiB", *FLAGS)
    code, _, err = emloc(*command, "--eval-split", 0.25, "--eval-steps", 1)
    assert code == 0, err
    assert load_recipe(out / "recipe.toml").data.eval_split == "0.25"
    entries = read_json(out / "adapter" / "log.json")
    assert sum("eval_loss" in entry for entry in entries) == 2
    rows = len(load_rows(str(rows_file))) - 5
    assert read_json(out / "adapter" / MANIFEST)["result"]["rows"] == rows - round(rows * 0.25)


def test_rows_in_memory(shallow_model, tmp_path):
    rows = [{"question": f"say {number}", "completion": f" {number}"} for number in range(40)]
    evaluation = {"evaluation": {"data": rows[:4]}, "eval_steps": 1}
    options = {"memory": "4GiB", **QUICK, **evaluation, "columns": {"prompt": "question"}}
    tuned = emloc_api.tune(shallow_model, rows, tmp_path / "tuned", **options)
    assert any("eval_loss" in entry for entry in read_json(tuned.path / "adapter" / "log.json"))
    assert tuned.final.kind == "adapter"
    assert tuned.final.load() is not None
    assert emloc_api.tune(shallow_model, rows, tmp_path / "tuned", **options).path == tuned.path
    with pytest.raises(EmlocError, match="holds other rows"):
        emloc_api.tune(shallow_model, rows[1:], tmp_path / "tuned", **options)


def test_a_run_that_was_killed_before_it_had_begun_begins_again(shallow_model, rows_file, tmp_path, monkeypatch):
    options = {"memory": "4GiB", **QUICK}
    with monkeypatch.context() as killed:
        killed.setattr("emloc_core.recipe.tune.write_text", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            emloc_api.tune(shallow_model, rows_file, tmp_path / "tuned", **options)
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {"tune.json", "held_out.jsonl"}
    assert emloc_api.tune(shallow_model, rows_file, tmp_path / "tuned", **options).final.path.name == "adapter"


def test_a_mistake_that_the_first_stage_finds_may_be_corrected(emloc, shallow_model, rows_file, tmp_path):
    out = tmp_path / "tuned"
    command = ("tune", shallow_model, "--data", rows_file, "-o", out, "--memory", "4GiB", *FLAGS)
    code, _, err = emloc(*command, "--lr", 1e30)
    assert code == 1
    assert "The stage 'adapter' failed" in err
    assert load_recipe(out / "recipe.toml").train.learning_rate == 1e30
    code, _, err = emloc(*command)
    assert code == 0, err
    assert "resuming" not in err
    assert load_recipe(out / "recipe.toml").train.learning_rate == 1e-2
    code, _, err = emloc(*command, "--lr", 1e-3)  # now there is work that other settings made
    assert code == 1
    assert "was made for something else: settings.learning_rate was 0.01 and is now 0.001" in err


def test_the_next_call_may_come_from_another_directory(shallow_model, rows_file, tmp_path, monkeypatch):
    def tune(model, rows):
        return Tune(model=model, data=rows, evaluation={"data": rows}, output=tmp_path / "out", memory="4GiB")

    monkeypatch.setattr("emloc_core.recipe.tune.run_recipe", None)
    with pytest.raises(TypeError):
        tune(str(shallow_model), str(rows_file)).run()
    monkeypatch.chdir(tmp_path)
    assert tune(os.path.relpath(shallow_model), os.path.relpath(rows_file)).started()


def test_what_is_refused(emloc, shallow_model, rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr("emloc_core.recipe.decided.call", None)  # at once: nothing is planned
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    good = (shallow_model, "--data", rows_file, "-o", tmp_path / "out")
    for message, arguments in {
        "There is no file": (shallow_model, "--data", tmp_path / "none.jsonl", "-o", tmp_path / "out"),
        "has no config.json": (tmp_path / "mine", "--data", rows_file, "-o", tmp_path / "out"),
        "was not written by `emloc tune`": (shallow_model, "--data", rows_file, "-o", tmp_path / "mine"),
        "Write the unit: 24GiB": (*good, "--memory", 24),
        "give steps or epochs": (*good, "--steps", 1, "--epochs", 1),
        "train.patience needs rows": (*good, "--memory", "4GiB", "--patience", 2),
        "no module 'nope'": (*good, "--memory", "4GiB", "--target-modules", "nope"),
    }.items():
        code, _, err = emloc("tune", *arguments)
        assert code != 0
        assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["recipe.toml", "held_out.jsonl", "notes.txt"])
def test_what_tune_did_not_write_stays_as_it_is(name, shallow_model, rows_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    for data in (str(rows_file), [{"text": "a"}, {"text": "b"}]):
        for output in (tmp_path / "mine", tmp_path / "mine" / name):
            with pytest.raises(EmlocError, match="was not written by `emloc tune`"):
                emloc_api.tune(shallow_model, data, output)
    assert [(path.name, path.read_text()) for path in (tmp_path / "mine").iterdir()] == [(name, "mine")]


def test_splits_in_memory(tmp_path, monkeypatch):
    rows = [{"text": letter} for letter in "abc"]
    splits = DatasetDict({"train": Dataset.from_list(rows[:2]), "test": Dataset.from_list(rows[2:])})
    check_rows(splits)
    requests = []
    monkeypatch.setattr(Tune, "run", lambda self, **_: requests.append(self))
    for number, evaluation in enumerate(({"split": "test"}, {"data": splits, "split": "test"})):
        emloc_api.tune("model", splits, tmp_path / str(number), evaluation=evaluation)
        assert load_rows(requests[-1].data) == load_rows(rows[:2])
        assert (load_rows(requests[-1].evaluation.data), requests[-1].evaluation.split) == (load_rows(rows[2:]), None)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "b", "completion": "a"}, {"prompt": "completion", "completion": "prompt"}),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"messages": "prompt"}),
    ],
)
def test_rows_in_memory_are_renamed_once(row, names, tmp_path):
    rows = load_rows([row], columns=names)
    assert load_rows(by_name([row], tmp_path, columns=names), columns=names) == rows
    assert load_rows(by_name([row], tmp_path, columns=names, name=EVALUATED), columns=names) == rows


def test_rows_in_memory_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    rows = [{"text": "a"}, {"text": "b"}]
    with monkeypatch.context() as killed:
        killed.setattr(Row, "to_dict", lambda row: {"text": "a"} if row.number == 1 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            by_name(rows, tmp_path / "tuned")
    assert not (tmp_path / "tuned" / ROWS).exists()
    assert load_rows(by_name(rows, tmp_path / "tuned")) == load_rows(rows)


def test_unwanted_answers_alone_are_refused_by_the_plan(emloc, shallow_model, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": text, "label": False} for text in "bc"])
    code, _, err = emloc(
        "tune", shallow_model, "--data", data, "-o", tmp_path / "out", "--objective", "kto", "--dry-run"
    )
    assert code == 1
    assert "No row has a wanted answer" in err


def test_another_base_to_evaluate_is_refused(shallow_model, rows_file, tmp_path):
    evaluated = {"data": str(rows_file), "on_base": True, "base": "another"}
    with pytest.raises(EmlocError, match="leave out `base`"):
        emloc_api.tune(str(shallow_model), data=str(rows_file), output=tmp_path / "tuned", evaluation=evaluated)


@pytest.mark.thorough
def test_bad_rows_are_left_out_and_counted(emloc, shallow_model, rows_file, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "tuned"
    data.write_text(rows_file.read_text() + '{"prompt": 3}\n{"prompt": \n')
    command = ("tune", shallow_model, "--data", data, "-o", out, "--memory", "4GiB", *FLAGS)
    code, _, err = emloc(*command)
    assert code == 1
    assert "row 121" in err
    code, _, err = emloc(*command, "--skip-bad-rows")
    assert code == 0, err
    assert "rows that cannot be used are left out: 2" in err
    assert read_json(out / "adapter" / MANIFEST)["result"]["skipped_rows"] == 2
    assert [json.loads(line)["row"] for line in (out / "adapter" / "skipped_rows.jsonl").open()] == [121, 122]


@pytest.mark.thorough
def test_bad_rows_in_memory_are_left_out(shallow_model, tmp_path):
    rows = [{"prompt": f"say {number}", "completion": f" {number}"} for number in range(40)]
    emloc_api.tune(shallow_model, [*rows, {}], tmp_path / "tuned", memory="4GiB", skip_bad_rows=True, **QUICK)
    assert len(load_rows(str(tmp_path / "tuned" / ROWS))) == 40
    assert json.loads((tmp_path / "tuned" / "skipped_rows.jsonl").read_text())["row"] == 41


@pytest.mark.thorough
def test_the_papers_way_even_where_a_lora_fits(emloc, shallow_model, rows_file, tmp_path):
    out = tmp_path / "tuned"
    command = ("tune", shallow_model, "--data", rows_file, "-o", out, "--memory", "4GiB", *FLAGS)
    code, _, err = emloc(*command, "--paper")
    assert code == 0, err
    settings = read_json(out / "emulator" / MANIFEST)["request"]["settings"]
    assert (settings["kind"], settings["calibration"], settings["paper"]) == ("low-rank", "base", True)
    assert read_json(out / "corrected" / MANIFEST)["request"]["clamp"] == 3
