"""The rows of ``benchmarks/quality.py``: nothing is tuned or chosen on rows that are measured."""

import io
import tarfile
from itertools import combinations
from pathlib import Path

import pytest
import quality_pictures
import quality_rows


@pytest.fixture
def archives(tmp_path):
    """A source archive like the package's, with few sentences, each rated twice, once with another number."""

    def packed(files):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    lines = [f"{n}\t{rating}\tThis is {'not ' * (n % 2)}sentence number {n} of all.\r\n"
             for n in range(500) for rating in ((-2.0, 0.1, 2.5)[n % 3],) for _ in range(2)]  # fmt: skip
    sources = ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets")
    inner = packed({f"h/{name}_GroundTruth.txt": "".join(lines).replace("This", name).encode() for name in sources})
    (tmp_path / "vadersentiment-3.3.2.tar.gz").write_bytes(packed({"p/hutto_ICWSM_2014.tar.gz": inner}))
    return tmp_path


@pytest.mark.parametrize("task", ["extraction", "classification", "arithmetic"])
def test_no_question_is_in_two_sets_and_test_rows_are_the_same_for_all_seeds(archives, task):
    first, second = (quality_rows.make_sets(task, seed, archives) for seed in (0, 1))
    calibration = quality_rows.SIZES["calibration"] + quality_rows.FURTHER
    sizes = {**quality_rows.SIZES, "calibration": calibration, "test": quality_rows.TEST}
    assert {name: len(rows) for name, rows in first.items()} == sizes
    for sets in (first, second):
        questions = {name: {quality_rows.question(row) for row in rows} for name, rows in sets.items()}
        assert all(len(questions[name]) == len(rows) for name, rows in sets.items())
        assert all(questions[one].isdisjoint(questions[other]) for one, other in combinations(questions, 2))
    assert first["test"] == second["test"]
    assert first["tuning"] != second["tuning"]


def test_more_rows_to_tune_on_begin_with_the_usual_ones_and_are_in_no_other_set():
    usual, more = (quality_rows.make_sets("arithmetic", 0, Path(), size) for size in (640, 1920))
    assert {name: rows[: len(usual[name])] for name, rows in more.items()} == usual
    questions = [{quality_rows.question(row) for row in rows} for rows in more.values()]
    assert len(more["tuning"]) == 1920
    assert len(set.union(*questions)) == sum(map(len, more.values()))


def test_a_conversation_becomes_a_prompt_and_its_completion():
    row = quality_rows.conversation("Answer.", "Who?", "Ada.")
    assert quality_rows.without_chat(row) == {"prompt": "Answer.\n\nWho?\n\n", "completion": "Ada."}


def test_no_picture_is_in_two_sets_and_those_for_testing_are_the_same_for_all_seeds(tmp_path):
    first, second = (quality_pictures.picture_sets(seed, tmp_path) for seed in (0, 1))
    sizes = {**quality_rows.SIZES, "selection": quality_pictures.SELECTION, "test": quality_rows.TEST}
    assert {name: len(rows) for name, rows in first.items()} == sizes
    for sets in (first, second):
        shown = {name: {Path(row["images"][0]).read_bytes() for row in rows} for name, rows in sets.items()}
        assert all(len(shown[name]) == len(rows) for name, rows in sets.items())
        assert all(shown[one].isdisjoint(shown[other]) for one, other in combinations(shown, 2))
    assert first["test"] == second["test"]
    assert first["tuning"] != second["tuning"]


def test_sources_and_feelings_are_as_frequent(archives):
    rows = [row for part in quality_rows.classification(archives) for row in part]
    answers = [row["messages"][-1]["content"] for row in rows]
    counts = {answer: answers.count(answer) for answer in answers}
    assert len(counts) == 12
    assert len(set(counts.values())) == 1


def test_the_answers_of_arithmetic_are_right():
    for part in quality_rows.arithmetic(None):
        for row in part:
            for step in row["messages"][-1]["content"].rstrip(".").split(". "):
                left, right = step.replace(" x ", " * ").replace(" / ", " // ").split(" = ")
                assert eval(left) == int(right), step
