"""Plans quote the recovery that the quality benchmark measured."""

import json
from statistics import mean

import pytest
from quality_cells import LORA, PICTURES, ROUNDS, USUAL_LORA, Cell
from quality_cells import RECOMMENDED as BENCHMARKED
from quality_report import recovery_rows
from quality_table import Table
from quality_wider import forgotten, lengths_table, mixtures_table, places_table
from support.paths import ROOT

from emloc_core.memory.evidence import RECOVERY, measured
from emloc_core.standins import RECOMMENDED, RECOMMENDED_WITH_IMAGES

#: Memory of kinds without a ratio, as the benchmark names it.
MEMORY = {"nf4": 0.28, "trellis": 0.17}
TASKS = ("extraction", "classification", "arithmetic")


def memory_of(kind, ratio):
    """The memory that the benchmark names a kind's ratio by."""
    factors = 0.13 if kind == "low-rank-2-bit" else 0.28  # of 16 bits, scales included
    return MEMORY.get(kind) or round(factors * ratio, 2)


@pytest.mark.parametrize(("kind", "ratio"), [(kind, ratio) for kind, ratios in RECOVERY.items() for ratio in ratios])
def test_plans_say_what_was_measured(kind, ratio):
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["recovery"]
    for system, recovery in zip(("auto", "polish20"), RECOVERY[kind][ratio][:2], strict=True):
        wanted = (f"{kind}+{system}", memory_of(kind, ratio))
        means = {row["task"]: row["mean"] for row in rows if (row["system"], row["memory"]) == wanted}
        task_means = [means[task] for task in TASKS]
        assert recovery == pytest.approx(mean(task_means), abs=0.005)


@pytest.mark.parametrize(("kind", "ratio"), [(kind, ratio) for kind, ratios in RECOVERY.items() for ratio in ratios])
def test_plans_say_what_longer_tuning_changes(kind, ratio):
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["wider"]
    wanted = ("demo", kind, memory_of(kind, ratio), *USUAL_LORA)
    matches = {(row["task"], row["steps"]): row for row in rows
             if tuple(row[name] for name in ("model", "kind", "memory", *LORA)) == wanted}  # fmt: skip
    longest = [row for (_, steps), row in matches.items() if steps == 960]
    changes = [row["auto"] - matches[row["task"], 60]["auto"] for row in longest]
    polished = [row["polish20"] for row in longest if row["polish20"] is not None]
    recovery = RECOVERY[kind][ratio]
    assert recovery.longer == (pytest.approx(mean(changes), abs=0.001) if changes else None)
    assert recovery.longer_polished == (pytest.approx(mean(polished), abs=0.001) if polished else None)


@pytest.mark.parametrize(("kind", "ratio"), [(kind, ratio) for kind, ratios in RECOVERY.items() for ratio in ratios])
def test_plans_say_what_rounds_gave(kind, ratio):
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["recovery"]
    memory, measured = memory_of(kind, ratio), {}
    for way, (rounds, _) in ROUNDS.items():
        means = {row["task"]: row["mean"] for row in rows if (row["system"], row["memory"]) == (f"{way}+auto", memory)}
        if way.startswith(f"{kind}-") and means.keys() == set(TASKS):
            measured[rounds] = mean(means[task] for task in TASKS)
    best, recovery = max(measured, key=measured.__getitem__, default=None), RECOVERY[kind][ratio]
    assert recovery.rounds == best
    assert recovery.in_rounds == (pytest.approx(measured[best], abs=0.005) if best else None)


def test_what_exact_steps_of_more_rows_are_said_to_give_was_measured():
    goals = json.loads((ROOT / "benchmarks/results/batches.json").read_text())["goals"]
    ordinary, such = (f"{goal['value']:.3f}" for goal in goals)
    evidence = " ".join((ROOT / "docs/evidence.md").read_text().split())
    assert f"they gave {ordinary} at 0.11, not 0.987 (beside such steps on the base, {such})" in evidence


def test_what_is_recommended_is_from_the_measurements_of_the_usual_set_up():
    results = json.loads((ROOT / "benchmarks/results/quality.json").read_text())
    usual = [row for row in results["rows"] if not Cell.from_row(row).is_wider]
    assert recovery_rows(Table(usual)) == results["recovery"]


@pytest.mark.parametrize("table", [lengths_table, mixtures_table, places_table])
def test_what_is_said_of_other_models_and_loras_was_measured(table):
    evidence = (ROOT / "docs/evidence.md").read_text()
    assert table(json.loads((ROOT / "benchmarks/results/quality.json").read_text())["wider"]) in evidence


def test_what_is_said_to_be_forgotten_was_measured():
    evidence = (ROOT / "docs/evidence.md").read_text()
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["rows"]
    assert forgotten(Table(rows).rows) in " ".join(evidence.split())


def test_what_corrections_are_said_to_change_was_measured():
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["rows"]
    rows = [row for row in rows if {"uncorrected", "auto"} <= row.get("systems", {}).keys()]
    gains = [
        row["systems"]["uncorrected"]["nll"] - row["systems"]["auto"]["nll"]
        for row in rows
        if row["chosen"] != {"clamp": 0, "scale": 1.0}
    ]
    sentence = f"`auto` changed {len(gains)} of {len(rows)} LoRAs, {sum(gain > 0 for gain in gains)} for the better."
    assert sentence in " ".join((ROOT / "docs/evidence.md").read_text().split())


def test_the_benchmark_calls_recommended_what_plans_recommend():
    for task, by_memory in BENCHMARKED.items():
        kinds = list(dict.fromkeys(by_memory[memory][0] for memory in sorted(by_memory, reverse=True)))
        wanted = RECOMMENDED_WITH_IMAGES if task == PICTURES else RECOMMENDED
        assert kinds == list(wanted[: len(kinds)])


def test_what_was_measured_of_a_smaller_emulator_is_a_lower_bound():
    recoveries = RECOVERY["low-rank-nf4"]
    assert measured("low-rank-nf4", min(recoveries) - 0.01) is None
    assert measured("low-rank-nf4", min(recoveries)) == recoveries[min(recoveries)]
    assert measured("low-rank-nf4", 0.99) == recoveries[max(recoveries)]
    assert measured("nf4", None) == RECOVERY["nf4"][0]
    assert measured("unmeasured", None) is None


def test_a_recommended_kind_carries_more_over_than_the_next():
    best = [measured(name, 0.99).corrected for name in RECOMMENDED if name in RECOVERY]
    assert best == sorted(best, reverse=True)
