"""Columns of Alpaca and ShareGPT become messages, and a note says so."""

import pytest
from support.rows import write_jsonl
from trl import extract_prompt

from emloc_core.data.messages import IMAGE
from emloc_core.data.row import parse_row
from emloc_core.data.rows import CALIBRATION, HELD_OUT, TUNE_REQUEST, load_rows, without, write_rows
from emloc_core.errors import EmlocError

ALPACA = {"instruction": "Which way?", "input": "", "output": "Left.", "text": "### Instruction: ..."}
SHAREGPT = {"conversations": [{"from": "human", "value": "Which way?"}, {"from": "gpt", "value": "Left."}]}
PLAIN = [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "Left."}]


def messages(**columns):
    row = parse_row(columns, "A row", 1)
    return [*row.prompt, *row.completion]


@pytest.mark.parametrize(("row", "name"), [(ALPACA, "Alpaca"), (SHAREGPT, "ShareGPT")])
def test_rows_equal_those_in_trls_columns_and_the_conversion_is_said(row, name, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [row, row])
    (first, _), (plain,) = load_rows(tmp_path / "rows.jsonl"), load_rows([{"messages": PLAIN}])
    assert first.key == plain.key
    notes = capsys.readouterr().err
    assert notes.count(f"{name}'s") == 1
    assert f"emloc: {tmp_path / 'rows.jsonl'}: {name}'s" in notes
    load_rows([{"messages": PLAIN, **row}])
    assert not capsys.readouterr().err


def test_an_alpaca_row_may_have_an_input_a_system_prompt_and_a_history():
    assert messages(**ALPACA | {"input": "At the oak."})[0]["content"] == "Which way?\nAt the oak."
    turns = messages(**ALPACA, system="Be short.", history=[["Hello?", "Hello."]])
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in turns[:3]] == ["Be short.", "Hello?", "Hello."]


def test_a_sharegpt_row_may_have_tools_a_system_prompt_and_messages():
    call = '{"name": "look", "arguments": {"at": "oak"}}'
    turns = [
        {"from": "human", "value": "Which way?"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "a fork"},
        {"from": "gpt", "value": "Left."},
    ]
    parsed = messages(conversations=turns, system="Be short.", tools='[{"name": "look"}]')
    assert [turn["role"] for turn in parsed] == ["system", "user", "assistant", "tool", "assistant"]
    assert parsed[2]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "oak"}}
    turns[1]["value"] = f"[{call}, {call}]"
    assert len(messages(conversations=turns)[1]["tool_calls"]) == 2
    assert messages(conversations=PLAIN) == PLAIN


def test_marks_of_images_become_parts(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhich way <image> now?"}, {"from": "gpt", "value": "Left."}]
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    row = parse_row({"conversations": turns, "images": ["a", "b"]}, "A row", 1, tmp_path)
    text = [{"type": "text", "text": part} for part in ("Which way", "now?")]
    assert row.prompt[0]["content"] == [IMAGE, text[0], IMAGE, text[1]]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"conversations": "hello"}, "`conversations` is str"),
        ({"conversations": ["hello"]}, "a turn that is not an object"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "a turn from 'narrator'"),
        ({"conversations": SHAREGPT["conversations"][:1]}, "does not end with an assistant turn"),
        ({**ALPACA, "history": ["a"]}, "`history` is not a list of question-answer pairs"),
        ({"instruction": "a"}, r"has the columns \['instruction'\]"),
    ],
)
def test_what_is_wrong_is_named(row, complaint):
    with pytest.raises(EmlocError, match=f"A row.*{complaint}"):
        parse_row(row, "A row", 1)


def test_columns_may_have_other_names():
    names = {"prompt": "question", "completion": "answer"}
    rows = [{"question": "a?", "answer": "b.", "prompt": "not this"}, {"prompt": "c?", "completion": "d."}]
    loaded = load_rows(rows, columns=names)
    assert [(row.prompt, row.completion) for row in loaded] == [("a?", "b."), ("c?", "d.")]
    dialog = [{"dialog": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]}]
    assert load_rows(dialog, columns={"messages": "dialog"})[0].completion == [dialog[0]["dialog"][1]]
    with pytest.raises(EmlocError, match=r"row 1: has no column question, answer; it has q, a\."):
        load_rows([{"q": "a?", "a": "b."}], columns=names)
    with pytest.raises(EmlocError, match=r"row 1: has no column answer; it has question, a\."):
        load_rows([{"question": "a?", "a": "b."}], columns=names)
    assert load_rows(rows, columns={**names, "tools": "functions"}) == loaded
    with pytest.raises(EmlocError, match=r"row 1: has no column dialog; it has dialogue, text\."):
        load_rows([{"dialogue": PLAIN, "text": "a"}], columns={"messages": "dialog"})
    with pytest.raises(EmlocError, match=r"no column 'question'\. Did you mean prompt=question\?"):
        load_rows(rows, columns={"question": "prompt"})


def test_rows_that_an_emulator_keeps_have_the_usual_columns(tiny_emulator, tmp_path):
    kept = load_rows(tiny_emulator / CALIBRATION)
    own = [{"question": row.prompt, "answer": row.completion} for row in kept]
    rows = load_rows(own, columns=(names := {"prompt": "question", "completion": "answer"}))
    assert without(rows, [tiny_emulator / CALIBRATION], columns=names) == []
    test = write_jsonl(tmp_path / "test.jsonl", own[:1])
    assert without(rows, [test], columns=names) == rows[1:]


def test_rows_that_a_run_keeps_have_the_usual_columns(tmp_path):
    rows = load_rows([{"prompt": PLAIN}], columns=(names := {"messages": "prompt"}))
    write_rows(tmp_path / HELD_OUT, rows)
    (tmp_path / TUNE_REQUEST).touch()
    assert load_rows(tmp_path / HELD_OUT, columns=names) == rows


@pytest.mark.parametrize(
    "names",
    [
        {"messages": "dialog"},
        {"conversations": "turns"},
        {"instruction": "task", "output": "answer"},
        {"prompt": "asked", "chosen": "good", "rejected": "bad"},
    ],
)
def test_rows_that_were_written_are_read_with_the_same_names(names, tmp_path):
    usual = {"messages": PLAIN, "prompt": "a", "chosen": "b", "rejected": "c", **ALPACA, **SHAREGPT}
    rows = load_rows([{own: usual[name] for name, own in names.items()}], columns=names)
    write_rows(tmp_path / "rows.jsonl", rows)
    assert load_rows(tmp_path / "rows.jsonl", columns=names) == rows
    assert without(rows, [tmp_path / "rows.jsonl"], columns=names) == []


def test_preferences_may_share_their_prompt():
    """As TRL finds it in them."""
    question, good, bad = ({"role": role, "content": text} for role, text in
                        (("user", "Which way?"), ("assistant", "Left."), ("assistant", "Up.")))  # fmt: skip
    for more in ({}, {"prompt": "Which way?"}, {"prompt": None, "prompt_id": "x"}):
        row = parse_row({"chosen": [question, good], "rejected": [question, bad], **more}, "A row", 1)
        assert (row.prompt, row.completion, row.rejected) == ([question], [good], [bad])
    row = parse_row(
        {"chosen": [question, good, question, good], "rejected": [question, good, question, bad]}, "A row", 1
    )
    assert (row.prompt, row.rejected) == ([question, good, question], [bad])
    texts = {"chosen": "Which way? Left.", "rejected": "Which way? Up."}
    row = parse_row(texts, "A row", 1)
    assert {"prompt": row.prompt, "chosen": row.completion, "rejected": row.rejected} == extract_prompt(texts)
    with pytest.raises(EmlocError, match=r"has the columns \['chosen', 'rejected'\]"):
        parse_row({"chosen": "Left.", "rejected": "Up."}, "A row", 1)
