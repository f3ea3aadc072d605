"""Rows are read in TRL's conventions, every bad row is named, and the sets never overlap."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from support.rows import example_rows, write_jsonl

from emloc_core.data.row import Row
from emloc_core.data.rows import digest, load_rows, without, write_rows
from emloc_core.data.sets import draw
from emloc_core.data.sources import reader_of
from emloc_core.errors import EmlocError

USER = {"role": "user", "content": "Which way?"}
ASSISTANT = {"role": "assistant", "content": "Left."}
SYSTEM = {"role": "system", "content": "Be short."}


def test_jsonl_json_and_parquet_hold_the_same_rows(tmp_path: Path, rows_file: Path):
    (tmp_path / "rows.json").write_text(json.dumps(example_rows()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(example_rows()), tmp_path / "rows.parquet")
    rows = load_rows(str(rows_file))
    assert [row.to_dict() for row in rows] == example_rows()
    assert [row.number for row in rows] == list(range(1, 121))
    assert load_rows(str(tmp_path / "rows.json")) == rows
    assert load_rows(str(tmp_path / "rows.parquet")) == rows


def test_messages_become_a_prompt_and_the_last_answer(tmp_path: Path):
    turns = [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}, {"prompt": turns[:4], "completion": turns[4:]}])
    first, second = load_rows(str(path))
    assert first.prompt == turns[:4]
    assert first.completion == [ASSISTANT]
    assert first.key == second.key
    assert first.form == "conversation"


def test_other_columns_and_nulls_are_ignored(tmp_path: Path):
    table = pyarrow.Table.from_pylist(
        [
            {"id": 7, "text": None, "messages": [USER | {"name": None}, ASSISTANT | {"name": None}]},
            {"id": 8, "text": None, "messages": [USER | {"name": None}, ASSISTANT | {"name": None}]},
        ]
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"))
    assert [row.to_dict() for row in rows] == [{"prompt": [USER], "completion": [ASSISTANT]}] * 2
    assert rows[0].key == rows[1].key


def test_tools_and_their_calls_are_one_conversation_however_written(tmp_path: Path):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    arguments = {"place": "Oslo", "days": [1, None]}
    plain = {
        "tools": [tool],
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": arguments}]},
            {"role": "tool", "content": "wet", "name": "weather"},
            ASSISTANT,
        ],
    }
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    as_text = {"tools": json.dumps([tool]), "messages": [USER, calling, *plain["messages"][2:]]}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([as_text, plain | {"tools": None}]), tmp_path / "rows.parquet"
    )
    write_jsonl(tmp_path / "rows.jsonl", [plain, as_text])
    one, other = load_rows(tmp_path / "rows.jsonl")
    parquet, without_tools = load_rows(tmp_path / "rows.parquet")
    assert one.key == other.key == parquet.key != without_tools.key
    assert one.tools == [tool]
    assert one.prompt[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    ]
    write_rows(tmp_path / "again.jsonl", [one])
    assert load_rows(tmp_path / "again.jsonl")[0].key == one.key


def test_which_answers_count_is_no_part_of_the_content():
    row = {"messages": [USER, ASSISTANT, USER, ASSISTANT]}
    (last,), (every,) = load_rows([row]), load_rows([row], loss="all")
    assert (last.loss, every.loss) == ("last", "all")
    assert last.key == every.key


def test_jsonl_keeps_line_numbers_and_unicode_line_separators(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"text": "one\u2028line"}\n\n{"text": "three"}\n', encoding="utf-8")
    assert [(row.number, row.text) for row in load_rows(str(path))] == [(1, "one\u2028line"), (3, "three")]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ('"\udcff"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (f'{{"text": {"1" * 5000}}}', "not valid JSON"),
        ("[1]", "not an object"),
        ('{"prompt": "a"}', r"columns \['prompt'\]"),
        ('{"prompt": "a", "completion": ""}', "`completion` is empty"),
        ('{"prompt": " ", "completion": "b"}', "`prompt` is empty"),
        ('{"prompt": "a", "completion": 5}', "not a string but int"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "one of prompt and completion"),
        ('{"prompt": [], "completion": []}', "`prompt` is empty"),
        ('{"text": ["a"]}', "not a string but list"),
        ('{"text": "\\ud800"}', "not valid Unicode"),
        ('{"messages": "hello"}', "not a list of messages"),
        ('{"messages": ["hello"]}', "not an object"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "does not end with an assistant turn"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "AI", "content": "b"}]}',
            "one of the AI, .*The roles",
        ),
        ('{"messages": [{"role": "human", "content": "a"}]}', "the human, which is called user here. The roles are"),
        ('{"prompt": [{"role": "gpt", "content": "a"}], "completion": []}', "the gpt, which is called assistant here"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing before"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "content is not a string"),
        (
            '{"messages": [{"role": "user", "content": "a"},{"role": "assistant", "content": "b", "tool_calls": [1]}]}',
            "a tool call without the name",
        ),
        (
            '{"messages": [{"role": "user", "content": "a", "audio": "b"},{"role": "assistant", "content": "b"}]}',
            r"a message of the user with \['audio'\]",
        ),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}', "content is not a string"),
        ('{"prompt": "a", "completion": "b", "tools": [{}]}', "a row of prompt and completion has tools"),
        (
            '{"tools": [1], "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "`tools` is not a list of objects",
        ),
        (
            '{"tools": "[", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "`tools`: not valid JSON",
        ),
        ('{"text": "of another form"}', "a row of text, but row 1 is of prompt and completion"),
    ],
)
@pytest.mark.usefixtures("uncollected")
def test_a_bad_row_is_named_with_its_file(tmp_path: Path, row: str, complaint: str):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    path.write_bytes(f"{good}\n{row}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(EmlocError, match=complaint) as error:
        load_rows(str(path))
    assert f"{path}, row 2" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("rows.jsonl", "", "holds no rows"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.json", '{"text": "a"}', "not an array"),
        ("rows.json", "[1", "not valid JSON"),
        ("rows.parquet", "PAR1 not really", "cannot be read as Parquet"),
        ("rows.xlsx", "text\na\n", r"does not end in \.jsonl"),
        ("rows.csv", "text\na,b\n", "row 1: more cells than columns"),
        ("rows.csv", 'text\n"a"b\n', "row 1: not valid CSV"),
        ("rows.csv", "text\n", "holds no rows"),
    ],
)
def test_a_bad_file_is_an_error(tmp_path: Path, name: str, content: str, complaint: str):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(EmlocError, match=complaint) as error:
        load_rows(str(path))
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_directory_are_errors(tmp_path: Path):
    with pytest.raises(EmlocError, match="There is no file"):
        load_rows(str(tmp_path / "rows.jsonl"))
    with pytest.raises(EmlocError, match="is a directory"):
        load_rows(str(tmp_path))
    for path in ("./rows", "../rows", "~/rows"):  # no names of the hub, which is not asked
        with pytest.raises(EmlocError, match=f"There is no file {path}. Check the path"):
            reader_of(path)


def test_a_name_that_is_no_file_is_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(EmlocError, match="There is no file nobody/rows, and the hub could not be reached"):
        load_rows("nobody/rows")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    from huggingface_hub import HfApi

    sources = []

    def refuse(_self, source, **_):
        sources.append(source)
        raise RuntimeError("no connection")

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(EmlocError, match="There is no file nobody/rows, and the hub could not be reached"):
        load_rows("nobody/rows")
    assert sources == ["nobody/rows"]
    assert "Retry" not in caplog.text


@pytest.mark.parametrize("name", ["rows", "some/where/rows"])
def test_a_name_that_no_data_set_can_have_is_not_looked_for(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("emloc_core.data.sources._read_hub", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(EmlocError, match=f"There is no file {name}. Check the path; a hub dataset is"):
        load_rows(name)


def test_a_key_depends_on_content_alone():
    keys = {
        Row(1, text="a").key,
        Row(1, text="b").key,
        Row(1, prompt="a", completion="b").key,
        Row(1, prompt="ab", completion="").key,
        Row(1, prompt=[USER], completion=[ASSISTANT]).key,
    }
    assert len(keys) == 5
    assert Row(1, text="a").key == Row(99, text="a").key


contents = st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=40)


@given(contents, st.integers(0, 5), st.integers(0, 3), st.integers(0, 3), st.randoms())
def test_sets_are_disjoint_reproducible_and_independent_of_order(texts, seed, calibration, selection, random):
    rows = [Row(number, text=text) for number, text in enumerate(texts, start=1)]
    if len(set(texts)) < calibration + selection:
        message = rf"{calibration + selection} distinct rows .* have {len(set(texts))} besides"
        with pytest.raises(EmlocError, match=message):
            draw(rows, seed, calibration, selection)
        return
    sets = draw(rows, seed, calibration, selection)
    drawn = [[row.text for row in part] for part in (sets.calibration, sets.selection, sets.tuning)]
    assert [len(part) for part in drawn[:2]] == [calibration, selection]
    assert len({*drawn[0]}) == calibration
    assert len({*drawn[1]}) == selection
    assert not {*drawn[0]} & {*drawn[1]}
    assert not ({*drawn[0]} | {*drawn[1]}) & {*drawn[2]}
    assert {text for part in drawn for text in part} == set(texts)
    counts = Counter(texts)
    assert Counter(drawn[2]) == {text: counts[text] for text in drawn[2]}  # copies are kept in tuning

    random.shuffle(texts)
    again = draw([Row(number, text=text) for number, text in enumerate(texts)], seed, calibration, selection)
    assert [[row.text for row in part] for part in (again.calibration, again.selection, again.tuning)] == drawn


def test_another_seed_draws_other_rows(rows_file: Path):
    rows = load_rows(str(rows_file))
    assert draw(rows, 0, 16, 8).calibration != draw(rows, 1, 16, 8).calibration


texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
messages = st.lists(st.builds(lambda role, text: {"role": role, "content": text}, texts, texts), min_size=1, max_size=3)


@given(
    st.one_of(
        st.lists(st.builds(lambda text: Row(0, text=text), texts), min_size=1),
        st.lists(st.builds(lambda a, b: Row(0, prompt=a, completion=b), texts, texts), min_size=1),
        st.lists(st.builds(lambda a, b: Row(0, prompt=a, completion=b), messages, messages), min_size=1),
    )
)
def test_written_rows_read_back(tmp_path_factory: pytest.TempPathFactory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, rows)
    again = load_rows(str(path))
    assert [row.to_dict() for row in again] == [row.to_dict() for row in rows]
    assert digest(again) == digest(rows)


def test_leaving_out_takes_every_copy_and_keeps_the_order(tmp_path):
    rows = [Row(number, text=text) for number, text in enumerate("abcab", start=1)]
    write_rows(tmp_path / "test.jsonl", rows[:1])
    (tmp_path / "empty.jsonl").touch()
    remaining = without(rows, [tmp_path / "test.jsonl", tmp_path / "empty.jsonl"])
    assert [row.number for row in remaining] == [2, 3, 5]
    splits = DatasetDict({name: Dataset.from_list([{"text": name}]) for name in "ab"})
    splits.save_to_disk(tmp_path / "splits")
    assert [row.number for row in without(rows, [tmp_path / "splits"], "b")] == [1, 3, 4]
    assert digest(remaining[:2]) != digest(remaining[1:])


def test_reading_rows_needs_no_torch():
    code = "import sys, emloc_core.data.rows; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_parquet_file_that_unpacks_to_very_much_is_refused(tmp_path: Path):
    repeated = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 2000, pyarrow.int32()), pyarrow.array(["x" * 2**20])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": repeated}), tmp_path / "rows.parquet")
    code = (
        "import sys; from emloc_core.files import limits; from emloc_core.data.rows import load_rows;"
        "limits._LEAST = 256 << 20; load_rows(sys.argv[1])"
    )
    # In a process of its own: what others have freed, and still hold, is not limited.
    command = [sys.executable, "-c", code, tmp_path / "rows.parquet"]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.search(r"EmlocError: .*(more than 256 MiB|malloc)", read.stderr)
