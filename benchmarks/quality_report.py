"""The results of ``quality.py``: recovery by task, memory and way; goals; and one line per cell."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from harness import goal, markdown, write_results
from quality_cells import (
    EXACT,
    FULL,
    MEMORIES,
    RECOMMENDED,
    SCRATCH,
    TASKS,
    VARIANTS,
    Cell,
)
from quality_figure import draw
from quality_rows import TEXTS
from quality_table import Table
from quality_wider import forgotten_table, wider_rows, wider_table

#: Recovery that is aimed at, by memory: without exact steps, and with 20.
GOALS = {0.6: (0.995, 1.0), 0.28: (0.995, 1.0), 0.17: (0.98, 0.995), 0.11: (0.96, 0.99), 0.07: (0.85, 0.97)}

#: What is reported of every cell, by its name there.
SYSTEMS = ("uncorrected", "paper", "auto", "polish10", "polish20")


def recovery_rows(table: Table) -> list[dict[str, Any]]:
    """Return ``recovery``: mean and spread over bases and seeds of every system, and of the recommended way."""
    summaries = []
    kinds = list(dict.fromkeys((row["kind"], row["memory"]) for row in table.rows if row["memory"] < 1))
    of_recommended = [(name, system, recommended_runs(table.best, system))
                      for name, system in (("emloc", "auto"), ("emloc+polish20", "polish20"))]  # fmt: skip
    for task in TASKS:
        values_of = [
            (f"{kind}+{system}", memory, table.recoveries(task, kind, memory, system))
            for kind, memory in kinds
            for system in SYSTEMS
        ]
        values_of += [
            (name, memory, table.recoveries_of(runs.values(), system))
            for name, system, recommended in of_recommended
            for (of_task, memory), runs in recommended.items()
            if of_task == task
        ]
        values_of.append((f"{SCRATCH}{EXACT[-1]}", 1, table.recoveries(task, SCRATCH, 1, SCRATCH)))
        for name, memory, values in values_of:
            if values:
                summaries.append({"task": task, "memory": memory, "system": name, "mean": round(mean(values), 4),
                                  "spread": round(stdev(values), 4) if len(values) > 1 else None,
                                  "runs": len(values)})  # fmt: skip
    return summaries


def recommended_runs(
    rows: Sequence[dict[str, Any]], system: str
) -> dict[tuple[str, float], dict[tuple[str, int], dict[str, Any]]]:
    """Return the measurements of the recommended way by task and memory, and there by base and seed."""
    measured = [row for row in rows if system in row["systems"]]
    return {
        (task, memory): {
            (row["base"], row["seed"]): row
            for row in measured
            if (row["task"], row["kind"], row["memory"]) == (task, *RECOMMENDED[task][memory])
        }
        for task, memory in itertools.product(TASKS, MEMORIES)
    }


def paired_rows(table: Table) -> list[dict[str, Any]]:
    """Return ``paired``: how much more the recommended way loses on a test row than others within the same memory.

    A row's loss is its mean over the bases and seeds that both ways have. What is given is the mean over rows, in nats
    per answer, with its 95 % interval; above 0 the other way is better. The same LoRA uncorrected is compared where
    ``auto`` chose as it does now; with exact steps, ways are compared where both began with the moments of tuning.
    """
    began_with_moments = [row for row in table.best if row.get("exact_moments")]
    comparisons = _behind("emloc", "auto", ("uncorrected", "auto"), table.best)
    comparisons += _behind("emloc+polish20", "polish20", ("polish20",), began_with_moments)
    return sorted(comparisons, key=lambda row: TASKS.index(row["task"]))


def _behind(name: str, system: str, others: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how much more a system of the recommended way loses than these systems of every way."""
    comparisons = []
    recommended = recommended_runs(rows, system).items()
    ways = _runs(rows, "task", "kind", "memory").items()
    for ((task, memory), runs), (way, other), theirs in itertools.product(recommended, ways, others):
        own = (task, *RECOMMENDED[task][memory])
        if way[0] != task or way[2] > memory or (way == own and theirs == system):
            continue
        is_same_lora = theirs == "uncorrected" and way == own
        ours = {run: row["systems"][system] for run, row in runs.items() if not is_same_lora or _chose_as_now(row)}
        comparisons += _compared(name, memory, ours, way, theirs, other)
    return comparisons


def _compared(
    name: str,
    memory: float,
    ours: Mapping[Any, dict[str, Any]],
    way: tuple[str, str, float],
    system: str,
    other: Mapping[Any, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return how much more we lose than a system of another way in the same runs; nothing if there are none."""
    task, kind, other_memory = way
    pairs = [(ours[run], other[run][system]) for run in ours.keys() & other.keys() if system in other[run]]
    if not pairs:
        return []
    return [{"task": task, "memory": memory, "system": name, "other": f"{kind}+{system}",
             "other_memory": other_memory, **_apart(pairs)}]  # fmt: skip


def _chose_as_now(row: dict[str, Any]) -> bool:
    """Return whether ``auto`` weighed gains by their standard error; an older one asked for less, and told no gains."""
    return "gain" in row.get("candidates", [{}])[0]


def variant_rows(table: Table) -> list[dict[str, Any]]:
    """Return ``variants``: how much more a variant of a kind loses than its default, as in :func:`paired_rows`.

    Both are at the same memory and learning rate.
    """
    ways = _runs(table.rows, "task", "kind", "memory", "learning_rate")
    comparisons = []
    for (task, kind, memory, rate), own in ways.items():
        if kind not in VARIANTS:
            continue
        default = ways.get((task, VARIANTS[kind]["kind"], memory, rate), {})
        if runs := own.keys() & default.keys():
            losses = {name: round(mean(way[run]["auto"]["nll"] for run in runs), 4)
                      for name, way in (("nll", own), ("default_nll", default))}  # fmt: skip
            apart = _apart([(own[run]["auto"], default[run]["auto"]) for run in runs])
            comparisons.append({"task": task, "memory": memory, "variant": kind, **losses, **apart})
    return sorted(comparisons, key=lambda row: (TASKS.index(row["task"]), row["memory"]))


def _runs(rows: Sequence[dict[str, Any]], *keys: str) -> dict[Any, dict[tuple[str, int], dict[str, Any]]]:
    """Return the systems of measurements by the values of these keys, and there by base and seed."""
    runs: dict[Any, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(tuple(row[key] for key in keys), {})[row["base"], row["seed"]] = row["systems"]
    return runs


def _apart(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Return how much more a test row loses in the first of each pair, on average over them, one per run."""
    by_row = [mean(row) for row in zip(*itertools.starmap(_differences, pairs), strict=True)]
    middle, reach = mean(by_row), 1.96 * stdev(by_row) / len(by_row) ** 0.5
    return {"runs": len(pairs), "mean": round(middle, 4), "low": round(middle - reach, 4),
            "high": round(middle + reach, 4)}  # fmt: skip


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[float]:
    """Return how much more every test row loses."""
    losses = (map(float, system["losses"].split()) for system in (ours, theirs))
    return [a - b for a, b in zip(*losses, strict=True)]


def best_table(table: Table) -> str:
    """Return every way at its best rate, with its recovery in brackets, in Markdown: as in ``docs/evidence.md``.

    Exact steps that began without the moments of tuning, as all did once, are marked with °.
    """
    header = ["task", "stand-in", "memory", "learning rate", "as it is", "tuned", "base with that LoRA",
              "`auto`, and what it chose", "and 20 exact steps"]  # fmt: skip
    first = [row for row in table.best if row["seed"] == 0 and row["kind"] != SCRATCH]
    bases = list(dict.fromkeys((row["task"], row["base"]) for row in table.rows))
    of_task = Counter(task for task, _ in bases)
    first.sort(key=lambda row: (TASKS.index(row["task"]), bases.index((row["task"], row["base"])), row["memory"],
                                row["kind"], row["steps"]))  # fmt: skip
    lines = []
    for row in first:
        systems = row["systems"]
        name = f"the base itself, {row['steps']} steps" if row["kind"] == FULL else f"`{row['kind']}`"
        alone, tuned = ("base", FULL) if row["kind"] == FULL else ("emulator", "tuned")
        uncorrected, auto, polished = (table.describe(row, system) for system in ("uncorrected", "auto", "polish20"))
        auto = ", ".join(filter(None, (auto, describe_choice(row))))
        if polished and not row.get("exact_moments"):
            polished += " °"
        own = (f"{systems[system]['nll']:.3f}" if system in systems else "" for system in (alone, tuned))
        task = row["task"] if of_task[row["task"]] == 1 else f"{row['task']}, base {row['base']}"
        lines.append([task, name, f"{row.get('share', 1):.3f}", f"{row['learning_rate']:g}", *own,
                      uncorrected, auto, polished])  # fmt: skip
    return markdown(header, lines)


def describe_choice(row: dict[str, Any]) -> str:
    """Return what ``auto`` chose in a cell, in words; nothing where it was not asked."""
    if "chosen" not in row:
        return ""
    clamp, scale = row["chosen"]["clamp"], row["chosen"].get("scale", 1)
    return f"scale {scale:g}" if scale != 1 else f"clamp {clamp:g}" if clamp else "none"


def stage_table(table: Table) -> str:
    """Return what the stages took of every way at its best rate, in Markdown."""
    shown = ("compress", "train", "auto", "polish20")

    def summary(stage: dict[str, float] | None) -> str:
        return f"{stage['seconds']:.0f} s, {stage['peak_rss_bytes'] / 1e9:.1f} GB" if stage else "-"

    lines = [
        [
            row["task"],
            row["kind"],
            str(row["memory"]),
            str(row["steps"]),
            *(summary(row["stages"].get(name)) for name in shown),
        ]
        for row in table.best
        if row["seed"] == 0 and "stages" in row
    ]
    return markdown(["task", "kind", "memory", "steps", *shown], lines)


def report(all_rows: list[dict[str, Any]]) -> None:
    """Write the results that there are: recovery, goals, and a line for every cell."""
    rows = [row for row in all_rows if not Cell.from_row(row).is_wider]
    table = Table(rows)
    recovery = recovery_rows(table)
    goals = []
    for memory, aims in GOALS.items():
        for system, aim in zip(("emloc", "emloc+polish20"), aims, strict=True):
            own = [row for row in recovery if (row["memory"], row["system"]) == (memory, system)]
            means = [row["mean"] for row in own if row["task"] in TEXTS]  # of pictures every kind gives nearly all
            if len(means) == len(TEXTS):
                value = round(mean(means), 3)
                name = f"recovery of {system} at {memory:g}, mean over the tasks with text"
                goals.append(goal(name, aim, value, value >= aim))
    lines = []
    for row in sorted(rows, key=lambda row: (row["task"], row["memory"], row["kind"], row["seed"], row["steps"])):
        systems = row["systems"]
        shown = [systems[name]["nll"] if name in systems else "-" for name in ("emulator", "tuned", *SYSTEMS)]
        alone, itself = (systems[name]["nll"] if name in systems else "-" for name in ("base", row["kind"]))
        lines.append([row["task"], row["base"], row["kind"], row["memory"], row["seed"], row["steps"],
                      row["learning_rate"],
                      alone, itself, *shown, describe_choice(row) or "-",
                      row["seconds"]])  # fmt: skip
    header = ["task", "base", "kind", "memory", "seed", "steps", "learning rate", "base", "tuned on it",
              "emulator", "tuned", *SYSTEMS, "chosen", "seconds"]  # fmt: skip
    text = (
        f"NLL per token on 160 test rows, every way at its best learning rate:\n\n{best_table(table)}\n\n"
        "Every cell; the columns from *uncorrected* on are the base with that LoRA:\n\n"
        f"{markdown(header, [[str(value) for value in line] for line in lines])}\n\nRecovery:\n\n"
        + markdown(
            ["task", "memory", "system", "mean", "spread", "runs"],
            [[str(row[key]) for key in ("task", "memory", "system", "mean", "spread", "runs")] for row in recovery],
        )
    )
    text += "\n\nSeconds and peak memory of the stages:\n\n" + stage_table(table)
    paired, variants = paired_rows(table), variant_rows(table)
    for title, comparisons in (("another way within the same memory", paired), ("the default of its kind", variants)):
        if comparisons:
            text += f"\n\nNats per answer above {title}, with 95 % intervals:\n\n"
            text += markdown(list(comparisons[0]), [[str(value) for value in row.values()] for row in comparisons])
    all_cells = Table(all_rows)
    wider = wider_rows(all_cells)
    text += f"\n\nRecovery with another model, length, rank or place of the LoRA:\n\n{wider_table(wider)}"
    text += "\n\nLoss of the base with LoRAs on rows that they were not tuned for:\n\n" + forgotten_table(
        all_cells.rows
    )
    for system in dict.fromkeys(row["system"] for row in paired):
        own = [row for row in paired if row["system"] == system]
        worse = [f"{row['task']} {row['memory']:g} {row['other']}" for row in own if row["low"] > 0]
        goals.append(goal(f"ways within the same memory that are better than {system}", "none",
                          ", ".join(worse) or "none", not worse))  # fmt: skip
    tables = {"recovery": recovery, "paired": paired, "variants": variants, "wider": wider}
    write_results("quality", "make bench-quality", all_rows, goals, text, **tables)
    draw(recovery, table.best, wider)
