"""Recipes: which texts are paths, and what is refused before a stage runs."""

import json
import re
from types import SimpleNamespace

import pytest
import tomli_w
from support.rows import example_rows, write_jsonl

from emloc_core.errors import EmlocError
from emloc_core.files.manifest import MANIFEST
from emloc_core.recipe.recipe import load_recipe
from emloc_core.recipe.run import BUNDLED, CHECK, require_named, require_tuning
from emloc_core.recipe.stages import stages

RECIPE = """
[model]
base = "{base}"
[data]
train = "{train}"
test = ["{test}"]
[eval]
tasks = ["{task}"]
"""
NAMES = {"base": "organisation/model-0.5B", "train": "rows", "test": "organisation/rows", "task": "hellaswag"}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe to a folder of its own, and stand in another one; return the recipe's path."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def write(more="", **texts):
        path = tmp_path / "recipes" / "recipe.toml"
        path.write_text(RECIPE.format(**{**NAMES, **texts}) + more)
        return path

    return write


def texts(recipe):
    return {
        "base": recipe.model.base, "train": recipe.data.train, "test": recipe.data.test[0], "task": recipe.eval.tasks[0]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("base", "model"),  # ids of models have an organisation
        ("base", "./model"),
        ("base", "../models/model"),
        ("base", "a/b/c"),
        ("train", "rows.jsonl"),
        ("train", "data/rows.json"),
        ("train", "rows.parquet"),
        ("train", "a/b/c"),
        ("test", "rows.jsonl"),
        ("task", "task.yaml"),
        ("task", "task.yml"),
        ("task", "tasks/loss"),
    ],
)
def test_a_path_is_beside_the_recipe_even_where_nothing_is(write, tmp_path, key, text):
    decoy = tmp_path / "elsewhere" / text
    decoy.parent.mkdir(parents=True, exist_ok=True)
    decoy.touch()  # what must not be found
    resolved = texts(load_recipe(write(**{key: text})))
    assert resolved == {**NAMES, key: str(tmp_path / "recipes" / text)}


@pytest.mark.parametrize("key", NAMES)
def test_a_name_stays_a_name_unless_it_is_beside_the_recipe(write, tmp_path, key):
    path = write()
    assert texts(load_recipe(path)) == NAMES
    (tmp_path / "recipes" / NAMES[key]).mkdir(parents=True)
    assert texts(load_recipe(path)) == {**NAMES, key: str(tmp_path / "recipes" / NAMES[key])}


def test_absolute_paths_and_paths_at_home(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    resolved = texts(load_recipe(write(base="/models/a", train="~/rows")))
    assert resolved == {**NAMES, "base": "/models/a", "train": str(tmp_path / "home" / "rows")}
    assert texts(load_recipe(write(base="~no one/a")))["base"] == str(tmp_path / "recipes" / "~no one" / "a")


def test_the_output_is_beside_the_recipe(write, tmp_path):
    assert load_recipe(write()).output == str(tmp_path / "recipes" / "emloc-run")


def test_what_cannot_be_read_is_one_error(write, tmp_path):
    with pytest.raises(EmlocError, match="recipes is a directory"):
        load_recipe(write().parent)
    with pytest.raises(EmlocError, match="There is no recipe at"):
        load_recipe(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["train.objective='dpo'", "data.eval='e.jsonl'"], "data.eval: preferences are not evaluated while tuning"),
        (["train.patience=2"], "train.patience needs rows to evaluate, but there are none"),
        (["polish.steps=1", "polish.patience=2"], "polish.patience needs rows to evaluate, but there are none"),
        (["data.eval_base=true"], "data.eval_base needs rows to evaluate, but there are none"),
    ],
)
def test_what_evaluation_cannot_do_is_said_before_the_first_stage(write, override, message):
    with pytest.raises(EmlocError, match=message):
        load_recipe(write(), override)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[]", "data.train: name at least one file or dataset."),
        ("{}", "data.train: name at least one file or dataset."),
        ("3", "data.train = 3: Input should be a valid string; data.train = 3: Input should be a valid list"),
        ("['a',3]", "recipe.toml: data.train.1 = 3: Input should be a valid string."),
        ("{a=-1}", "recipe.toml: data.train.a = -1: Input should be greater than 0."),
    ],
)
def test_rows_that_are_not_named_are_refused(write, rows, message):
    with pytest.raises(EmlocError, match=re.escape(message)):
        load_recipe(write(), [f"data={{train={rows}}}"])


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.target_modules=['nope']", "no module 'nope'"),
        ("train.extra={foo=1}", "no field 'foo'"),
        ("polish={extra={foo=1}}", "no field 'foo'"),
        ("train.report_to='nowhere'", "The tracker 'nowhere' cannot be used"),
        ("polish={report_to='nowhere'}", "The tracker 'nowhere' cannot be used"),
    ],
)
@pytest.mark.usefixtures("calls_here")
def test_what_tuning_cannot_do_is_said_before_the_first_stage(write, override, message, dry_run, emloc, shallow_model):
    path = write(base=shallow_model, train="org/rows", task="task.yaml")
    (path.parent / "task.yaml").write_text("task: a")
    code, _, err = emloc("run", path, *dry_run, "--set", override)
    assert code == 1
    assert message in err
    assert not (path.parent / "emloc-run").exists()


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.tasks=['./mine.yaml']", "mine.yaml. Did you mean 'mime.yaml'?"),
        ("eval.tasks=['mime.yaml']", "mime.yaml does not hold keys and values"),
        ("output='mime.yaml/run'", "mime.yaml is not a directory. Choose another output directory."),
        ("data={train='org/rows',eval='mime.yaml'}", "mime.yaml holds no rows"),
        ("answers.rows='none.jsonl'", "none.jsonl. Check the path"),
        ("answers.rows='named.jsonl'", "named.jsonl, row 1: has the columns ['question']"),
        ("data={train='train.jsonl',eval_split='dev'}", "train.jsonl is a file, which has no split 'dev'"),
        ("data={train='none.jsonl',calibration='mime.yaml'}", "There is no file"),
        ("correct.correction='nope'", "There is no 'nope' among the corrections"),
    ],
)
def test_what_is_missing_is_named_before_the_first_stage(write, override, message, dry_run, emloc, monkeypatch):
    monkeypatch.setattr("emloc_core.recipe.run.call", None)  # no stage is begun or described
    path = write(train="org/rows")
    (path.parent / "mime.yaml").touch()
    for name in ("named.jsonl", "train.jsonl"):
        (path.parent / name).write_text('{"question": "a"}')
    code, _, err = emloc("run", path, *dry_run, "--set", override)
    assert code == 1, err
    assert message in err


@pytest.mark.usefixtures("calls_here")
def test_rows_to_answer_are_read_as_those_to_tune_on(emloc, shallow_model, tmp_path):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in example_rows()[:6]]
    write_jsonl(tmp_path / "train.jsonl", rows[1:])
    write_jsonl(tmp_path / "test.jsonl", rows[:1])
    settings = {
        "way": "lora", "merge": False, "model": {"base": str(shallow_model)}, "train": {"steps": 1, "bf16": False},
        "data": {
            "train": "train.jsonl", "test": ["test.jsonl"], "columns": {"prompt": "question", "completion": "answer"}
        },
        "answers": {"rows": "test.jsonl", "max_new_tokens": 1},
    }  # fmt: skip
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(settings))
    code, out, err = emloc("run", tmp_path / "recipe.toml", "--json")
    assert code == 0, err
    (answer,) = json.loads(out)["answers"]
    assert (answer["prompt"], answer["expected"]) == (rows[0]["question"], rows[0]["answer"])


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.usefixtures("calls_here")
def test_a_task_that_lm_eval_lacks_is_named_before_the_first_stage(
    write, dry_run, emloc, monkeypatch, shallow_model, rows_file
):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: SimpleNamespace(all_tasks=["hellaswag"]))
    path = write(base=shallow_model, train=rows_file, task="hellaswagg")
    code, _, err = emloc("run", path, *dry_run)
    assert code == 1, err
    assert "lm-eval has no task of that name. Did you mean 'hellaswag'?" in err
    assert not (path.parent / "emloc-run").exists()


def test_what_is_finished_needs_neither_its_tracker_nor_the_list_of_tasks(write, monkeypatch):
    asked = []
    monkeypatch.setattr("emloc_core.recipe.run.call", lambda function, _: asked.append(function) or [])
    path = write('[train]\nreport_to = "nowhere"\n[polish]\n', train="org/rows")
    for finished, expected in (
        ([], [BUNDLED, CHECK]),
        (["adapter"], [BUNDLED, CHECK]),  # the exact steps are still to come
        (["polished"], [BUNDLED]),
        (["evaluation"], []),
    ):
        for name in finished:
            (path.parent / "emloc-run" / name).mkdir(parents=True)
            (path.parent / "emloc-run" / name / MANIFEST).write_text("{}")
        asked.clear()
        require_named(load_recipe(path))
        require_tuning(load_recipe(path))
        assert asked == expected


def test_a_recipe_may_be_edited_while_it_runs(write, emloc, monkeypatch):
    path, directories = write(), []
    monkeypatch.setattr("emloc_core.recipe.run.run_recipe", lambda *_, **__: path.unlink())
    monkeypatch.setattr("emloc_core.cli.run.show", lambda _, directory, __: directories.append(directory))
    assert emloc("run", path)[0] == 0
    assert directories == [path.parent / "emloc-run"]


def test_comparing_clamps_needs_selection_rows(write):
    path = write("[compress]\nselection = 0\n")
    with pytest.raises(EmlocError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"{path}: correct.clamp = 'auto' compares on held-out rows, but compress.selection = 0 holds out none; "
        "hold some out, or set correct.clamp to a number or 'none'. Correct these settings."
    )
    assert load_recipe(path, ["correct.clamp=3"]).correct.clamp == 3
    assert load_recipe(path, ["correct.clamp=none"]).correct.clamp == "none"
    assert load_recipe(path, ["compress.selection=1"]).compress.selection == 1


def test_a_budget_and_a_ratio_contradict_each_other(write):
    budget = write("[compress]\nsamples = 8\n")
    assert load_recipe(budget, ["model.memory=24GiB"]).model.memory == "24GiB"
    with pytest.raises(EmlocError, match="both set the emulator's size; give one of them"):
        load_recipe(budget, ["model.memory=24GiB", "compress.ratio=0.5"])


def test_calibration_rows_may_come_from_a_file_of_their_own(write, tmp_path):
    two_files = stages(load_recipe(write(), ["data.calibration=others.jsonl"]))
    one_file = stages(load_recipe(write()))
    rows = {stage.name: stage.request.data for stage in two_files if hasattr(stage.request, "data")}
    assert rows == {"emulator": str(tmp_path / "recipes" / "others.jsonl"), "adapter": "rows"}
    assert two_files[1:] == one_file[1:]


def test_all_stages_count_the_same_answers_unless_they_say_otherwise(write):
    def losses(text):
        planned = stages(load_recipe(write(text)))
        return {stage.name: stage.request.settings.loss for stage in planned if hasattr(stage.request, "data")}

    assert losses('[train]\nloss = "all"\n[polish]\n') == dict.fromkeys(("emulator", "adapter", "polished"), "all")
    assert losses('[train]\nloss = "all"\n[polish]\nloss = "last"\n')["polished"] == "last"
    assert losses("[polish]\n") == dict.fromkeys(("emulator", "adapter", "polished"), "last")


def test_rows_may_come_from_several_files_with_weights(write, tmp_path):
    def rows(value):
        (name,) = {str(stage.request.data) for stage in stages(load_recipe(write(), [f"data.train={value}"]))[:2]}
        return name

    directory = str(tmp_path / "recipes")
    assert rows('["a.jsonl", "org/rows"]') == str([f"{directory}/a.jsonl", "org/rows"])
    assert rows('{"a.csv" = 2, "org/rows" = 0.5}') == str({f"{directory}/a.csv": 2.0, "org/rows": 0.5})
    with pytest.raises(EmlocError, match="greater than 0"):
        rows('{"a.csv" = 0}')


def test_the_option_of_a_setting_is_known_by_its_name(write):
    with pytest.raises(EmlocError, match=r"'train\.lr'\. Did you mean 'learning_rate'"):
        load_recipe(write(), ["train.lr=1e-3"])


def test_a_value_in_the_place_of_a_section_is_told_which_section(write):
    path = write()
    path.write_text('model = "organisation/model"\n[data]\ntrain = "rows"\n')
    with pytest.raises(EmlocError, match=r"model = 'organisation/model': this is a section, with base, memory"):
        load_recipe(path)


def test_a_share_to_hold_out_may_be_a_number(write):
    recipe = load_recipe(write(), ["data.eval_split=0.05"])
    assert stages(recipe)[1].request.evaluation.split == "0.05"


def test_polish_comes_before_merging_and_is_compared_at_equal_totals(write):
    polished = "full_lora = true\n[train]\nsteps = 40\nlora_rank = 4\n[polish]\nlearning_rate = 1e-3\nsteps = 20\n"
    planned = {stage.name: stage.request for stage in stages(load_recipe(write(polished)))}
    assert list(planned) == [
        "emulator", "adapter", "corrected", "polished", "merged", "full_lora", "exact_alone", "full_lora_60",
        "evaluation",
    ]  # fmt: skip
    polish, alone, longer = (planned[name] for name in ("polished", "exact_alone", "full_lora_60"))
    assert polish.adapter.name == "corrected"
    assert planned["merged"].adapter.name == "polished"
    assert polish.exclude == alone.exclude == longer.exclude
    assert [path.name for path in polish.exclude[-2:]] == ["calibration.jsonl", "selection.jsonl"]
    assert (alone.exact, longer.exact) == (True, False)
    assert (polish.settings.learning_rate, alone.settings.learning_rate) == (1e-3, None)  # from scratch
    assert (alone.settings.steps, alone.settings.lora_rank) == (20, 4)
    assert (longer.settings.steps, longer.settings.learning_rate) == (60, None)
    compared = [system.name for system in planned["evaluation"].systems]
    assert compared[-5:] == ["base+corrected", "base+polished", "full_lora", "exact_alone", "full_lora_60"]


def test_the_exact_steps_of_the_control_are_those_of_polishing(write):
    shape = "full_lora = true\n[train]\nsteps = 40\nmax_length = 64\nloss = 'all'\n[polish]\nsteps = 5\n"
    planned = {stage.name: stage.request for stage in stages(load_recipe(write(shape)))}
    polish, alone = planned["polished"].settings, planned["exact_alone"].settings
    differing = {name for name in type(polish).model_fields if getattr(polish, name) != getattr(alone, name)}
    assert differing <= {"learning_rate"}


def test_polish_after_epochs_has_no_longer_control(write):
    planned = [stage.name for stage in stages(load_recipe(write("full_lora = true\n[train]\nepochs = 2\n[polish]\n")))]
    assert "exact_alone" in planned
    assert not any(name.startswith("full_lora_") for name in planned)
