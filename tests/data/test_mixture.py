"""Several sources make one list of rows, each source as often as its weight says."""

from collections import Counter
from pathlib import Path

import pytest
from support.rows import example_rows, write_jsonl

from emloc_core.data.mixture import parse_sources
from emloc_core.data.row import Row
from emloc_core.data.rows import load_rows
from emloc_core.data.sets import draw
from emloc_core.errors import EmlocError


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    rows = example_rows()
    return str(write_jsonl(tmp_path / "a.jsonl", rows[:80])), str(write_jsonl(tmp_path / "b.jsonl", rows[80:]))


def test_rows_come_as_often_as_the_weights_say(files):
    a, b = files
    plain, other = load_rows(a), load_rows(b)
    assert load_rows(list(files)) == [*plain, *other]
    counts = Counter(row.key for row in load_rows({a: 2, b: 0.25}))
    assert {counts[row.key] for row in plain} == {2}
    assert sorted(counts[row.key] for row in other) == [0] * 30 + [1] * 10
    counts = Counter(row.key for row in load_rows({a: 1.5}))
    assert sorted(counts.values()) == [1] * 40 + [2] * 40


def test_the_share_of_a_source_depends_on_content_alone(files, tmp_path):
    backwards = str(write_jsonl(tmp_path / "c.jsonl", example_rows()[:80][::-1]))
    shares = [{row.key for row in load_rows({name: 0.3})} for name in (files[0], backwards)]
    assert shares[0] == shares[1]


def test_a_row_of_a_mixture_is_named_with_its_source(files, tmp_path):
    a, b = files
    assert load_rows({a: 1, b: 1})[80].name == f"Row 1 of {b}"
    text = str(write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}]))
    with pytest.raises(EmlocError, match=f"Row 1 of {text}: a row of text, but Row 1 of {a} is of prompt"):
        load_rows([a, text])


@pytest.mark.parametrize("weight", [0, -1, float("nan"), True, "2"])
def test_a_weight_is_a_positive_number(files, weight):
    with pytest.raises(EmlocError, match="not a number above 0"):
        load_rows({files[0]: weight})


def test_sources_on_a_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:3").touch()
    assert parse_sources(["a.jsonl"]) == "a.jsonl"
    assert parse_sources(["a.jsonl:0.5"]) == {"a.jsonl": 0.5}
    assert parse_sources(["a.jsonl", "org/rows:2", "odd:3"]) == {"a.jsonl": 1, "org/rows": 2, "odd:3": 1}
    with pytest.raises(EmlocError, match="given twice"):
        parse_sources(["a.jsonl", "a.jsonl:2"])


def test_a_source_that_a_list_names_twice_is_refused_as_on_a_command_line(files):
    with pytest.raises(EmlocError, match="given twice"):
        load_rows([files[0], files[1], Path(files[0])])


def test_rows_that_occur_twice_are_drawn_earlier():
    twice = [Row(number, text=f"twice {number}") for number in range(300)] * 2
    once = [Row(number, text=f"once {number}") for number in range(300)]
    drawn = draw([*twice, *once], 0, 150, 0).calibration
    assert 85 <= sum(row.text.startswith("twice") for row in drawn) <= 115
