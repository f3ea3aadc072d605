"""The table and its sentence."""

import pytest

from emloc_core.cli.console import print_table
from emloc_core.report import table as report
from emloc_core.units import human_bytes, human_seconds

GB = 10**9
SYSTEMS = {
    "full_lora": {"nll": 0.77, "exact_match": 0.9, "seconds": 61.0, "peak_bytes": 2 * GB},
    "mine": {"nll": float("nan"), "exact_match": 0.2, "seconds": 62.0, "peak_bytes": 3 * GB},
    "base+corrected": {"nll": 1.01, "exact_match": 0.8, "seconds": 63.0, "peak_bytes": 2 * GB},
    "base": {"nll": 1.53, "seconds": 59.0, "peak_bytes": 1.5 * GB},
    "emulator": {"nll": 2.33, "exact_match": 0.0, "seconds": 58.5, "peak_bytes": 1.25 * GB},
}


def test_rows_stand_in_the_canonical_order_and_mark_the_best():
    rows = report.rows(SYSTEMS)
    assert [row["system"] for row in rows] == ["base", "emulator", "base+corrected", "full_lora", "mine"]
    assert {row["system"]: row["best"] for row in rows if row["best"]} == {
        "full_lora": ["nll", "exact_match"],
        "emulator": ["seconds", "peak_bytes"],
    }
    assert rows[0]["exact_match"] is None


def test_a_task_says_which_direction_is_better():
    systems = {"a": {"errors": 3.0, "odd": 1.0}, "b": {"errors": 1.0, "odd": 2.0}}
    metrics = {"errors": {"higher_is_better": False}, "odd": {"higher_is_better": None}}
    assert [row["best"] for row in report.rows(systems, metrics)] == [[], ["errors"]]
    assert "| errors ↓ | odd |" in report.markdown(systems, metrics)


def test_nothing_is_best_where_all_are_equal_or_alone():
    assert report.rows({"a": {"nll": 1.0}, "b": {"nll": 1.0}})[0]["best"] == []
    assert report.rows({"a": {"nll": 1.0}})[0]["best"] == []


def test_markdown():
    lines = report.markdown(SYSTEMS).splitlines()
    assert lines[0] == "| system | nll ↓ | exact_match ↑ | time | peak memory |"
    assert lines[2] == "| base | 1.5300 | - | 59 s | 1.5 GB |"
    assert lines[5] == "| full_lora | **0.7700** | **0.9000** | 61 s | 2 GB |"


def test_a_table_that_is_not_on_a_terminal_is_not_folded(capsys):
    systems = {name: {f"a_metric_with_a_long_name_{i}": float(i) for i in range(5)} for name in report.ORDER}
    print_table(report.table(systems))
    lines = capsys.readouterr().out.splitlines()
    assert sum("base+uncorrected" in line and "4.0000" in line for line in lines) == 1


def test_nll_of_two_tasks_come_first_and_are_losses():
    systems = {"a": {"acc": 1.0, "x.nll": 1.0, "y.nll": 2.0}, "b": {"acc": 0.0, "x.nll": 2.0, "y.nll": 1.0}}
    assert report.markdown(systems).startswith("| system | x.nll ↓ | y.nll ↓ | acc ↑ |")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_700, "1 MB"), (1.234e9, "1.23 GB"), (1.5e12, "1,500 GB")],
)
def test_bytes_for_reading(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "40 ms"),
        (9.97, "10 s"),
        (59.6, "60 s"),
        (125, "2 min 05 s"),
        (3599.9, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_seconds_for_reading(seconds, text):
    assert human_seconds(seconds) == text


def test_the_conclusion_is_the_share_of_what_a_lora_gains():
    text = report.conclusion({"systems": {**SYSTEMS, "base+uncorrected": {"nll": 1.15}}})
    assert "base+corrected 1.0100, 68% of it" in text  # (1.53 - 1.01) / (1.53 - 0.77)
    assert "base+uncorrected 1.1500, 50% of it" in text
    without = {name: row for name, row in SYSTEMS.items() if name != "full_lora"}
    assert "%" not in report.conclusion({"systems": without})
    assert report.conclusion({"systems": {"base": {"nll": 1.0}}}) == ""


def test_the_conclusion_says_when_nothing_was_corrected():
    assert "The clamp chosen is 0" in report.conclusion({"systems": SYSTEMS, "correction": {"clamp": 0}})
    assert "clamp" not in report.conclusion({"systems": SYSTEMS, "correction": {"clamp": 0.3}})
