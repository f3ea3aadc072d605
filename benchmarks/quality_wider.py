"""Recovery beyond the usual set-up of ``quality.py``: another model, more steps, another LoRA."""

from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from typing import Any

from harness import markdown
from quality_cells import (
    ALL,
    BATCH,
    FULL,
    LONGER,
    LORA,
    MIXTURES,
    MODELS,
    OFFERED,
    PLAIN,
    RANK,
    RSLORA,
    SECOND_TASK,
    STEPS,
    TASKS,
    USUAL_LORA,
    WIDER_TASK,
    Cell,
    wider_ways,
)
from quality_rows import UNRELATED
from quality_table import Table

SYSTEMS = ("uncorrected", "auto", "polish20")
_POLISHED = "and 20 exact steps"
#: What is told of a cell.
DESCRIBED = ("task", "model", "steps", "batch", *LORA, "kind", "memory", "learning_rate")


def wider_rows(table: Table) -> list[dict[str, Any]]:
    """Return ``wider``: the recovery of every wider cell and, to stand beside them, of the usual cells like them.

    ``reach`` is half the 95 % interval of ``auto``, over the test rows that the cell and its control share;
    ``divergence`` the emulator's from the base, where it was measured.
    """
    cells = [(row, Cell.from_row(row)) for row in table.best]
    ways = {(cell.kind, cell.memory) for _, cell in cells if cell.is_wider and cell.model not in MIXTURES}
    usual = {(task, *way, 0, STEPS, BATCH) for task in (WIDER_TASK, SECOND_TASK) for way in {*ways, *wider_ways()}}
    rows = []
    for row, cell in cells:
        of_usual = (cell.task, cell.kind, cell.memory, cell.seed, cell.steps, cell.batch) in usual
        if cell.kind == FULL or not (cell.is_wider or of_usual):
            continue
        recoveries = {system: table.recovery(row, system) for system in SYSTEMS}
        if recoveries["auto"] is None:
            continue
        rounded = {name: None if value is None else round(value, 4) for name, value in recoveries.items()}
        described = {name: getattr(cell, name) for name in DESCRIBED}
        rows.append({**described, **rounded, "reach": _reach(table, row), "divergence": row.get("divergence")})
    return sorted(rows, key=_order)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what orders rows: by scaling, place and rank of the LoRA, the usual first; by task, model and length."""
    unusual = (row["scaling"] != PLAIN, row["targets"] != ALL, row["rank"] != RANK)
    return (*unusual, row["rank"], row["task"], -row["batch"], row["model"], row["steps"], -row["memory"])


def _reach(table: Table, row: dict[str, Any]) -> float:
    """Return half of the 95 % interval of a cell's recovery with ``auto``, paired by test rows."""
    control = table.control(row, row["steps"])
    assert control is not None
    base, full, own = (_losses(system) for system in (control["base"], control[FULL], row["systems"]["auto"]))
    behind = [a - b for a, b in zip(own, full, strict=True)]
    return round(1.96 * stdev(behind) / len(behind) ** 0.5 / (mean(base) - mean(full)), 4)


def _losses(system: dict[str, Any]) -> list[float]:
    return list(map(float, system["losses"].split()))


def wider_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    header = ["task", "model", "steps", "rows per step", "LoRA", "stand-in", "memory", "learning rate", "uncorrected",
              "`auto`", "95 %", "and 20 exact steps", "KL"]  # fmt: skip
    lines = []
    for row in rows:
        line = [row["task"], MODELS[row["model"]], str(row["steps"]), str(row["batch"]), _lora(row), f"`{row['kind']}`"]
        line += [f"{row['memory']:g}", f"{row['learning_rate']:g}"]
        uncorrected, auto, polished = ("" if row[name] is None else f"{row[name]:.3f}" for name in SYSTEMS)
        lines.append([*line, uncorrected, auto, f"± {row['reach']:.3f}", polished, _divergence(row)])
    return markdown(header, lines)


def lengths_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return, in Markdown, what ``auto`` recovers on dense models, by the steps of the usual LoRA.

    Last, what 20 exact steps make of the longest tuning.
    """
    line: dict[tuple[str, ...], str] = {}
    for row in rows:
        if _lora_key(row) == USUAL_LORA and row["model"] not in MIXTURES and row["kind"] in OFFERED:
            way = (row["task"], MODELS[row["model"]], *_standin(row))
            line[*way, f"{row['steps']} steps"] = _recovered(row)
            if row["steps"] == LONGER[-1] and row[SYSTEMS[-1]] is not None:
                line[*way, _POLISHED] = f"{row[SYSTEMS[-1]]:.3f}"
    columns = [*(f"{steps} steps" for steps in (STEPS, *LONGER)), _POLISHED]
    return _pivoted(["task", "model", "kind", "memory"], columns, line)


def mixtures_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return, in Markdown, what ``auto`` recovers on mixtures of experts from emulators of every kind, by task."""
    line: dict[tuple[str, ...], str] = {}
    for row in sorted(rows, key=lambda row: -row["memory"]):
        if row["model"] in MIXTURES and row["kind"] in OFFERED:
            line[*_standin(row), row["task"]] = _recovered(row)
    return _pivoted(["kind", "memory"], TASKS, line)


def _standin(row: dict[str, Any]) -> tuple[str, str]:
    return f"`{row['kind']}`", f"{row['memory']:g}"


def _pivoted(keys: list[str], columns: Sequence[str], line: dict[tuple[str, ...], str]) -> str:
    """Return a table of cells by all their keys, the last of which names the column."""
    ways = dict.fromkeys(cell[:-1] for cell in line)
    return markdown([*keys, *columns], [[*way, *(line.get((*way, column), "") for column in columns)] for way in ways])


def places_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return, in Markdown, what ``auto`` recovers with LoRAs of other ranks and places."""
    others = [row for row in rows if _lora_key(row) != USUAL_LORA and row["kind"] in OFFERED]
    return markdown(["LoRA", "recovery"], [[_lora(row), _recovered(row)] for row in others])


def _recovered(row: dict[str, Any]) -> str:
    return f"{row['auto']:.3f} ± {row['reach']:.3f}"


def _divergence(row: dict[str, Any]) -> str:
    return "" if row["divergence"] is None else f"{row['divergence']:.4f}"


def forgotten_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return, in Markdown, the loss of the base with a LoRA on rows that it was not tuned for, beside its control's."""
    tuned = [f"{name}, tuned on the {source}" for name in UNRELATED for source in ("base", "emulator")]
    lines = []
    for row, control, own in _elsewhere(rows):
        line = [row["task"], MODELS[row["model"]], str(row["steps"]), _lora(row), f"`{row['kind']}`"]
        lines.append([*line, *(f"{losses[name]:.3f}" for name in UNRELATED for losses in (control, own))])
    return markdown(["task", "model", "steps", "LoRA", "kind", *tuned], lines)


def forgotten(rows: Sequence[dict[str, Any]]) -> str:
    """Return, in a sentence, how many LoRAs from emulators lose more elsewhere than their controls, and how much."""
    more = {name: [own[name] - control[name] for _, control, own in _elsewhere(rows)] for name in UNRELATED}
    parts = []
    for name, differences in more.items():
        worse = [difference for difference in differences if difference > 0]
        most = f", by at most {max(worse):.3f}" if worse else ""
        parts.append(f"on {UNRELATED[name]}, {len(worse)} of {len(differences)}{most}")
    return "; ".join(parts)


def _elsewhere(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, float], dict[str, float]]]:
    """Yield measurements of emulators' LoRAs, with the losses elsewhere of their control and their own.

    Those of LoRAs that were tuned on what is elsewhere for others are left out.
    """
    controls = {_way(row): row["elsewhere"][FULL] for row in rows if FULL in row.get("elsewhere", {})}
    for row in rows:
        own, control = row.get("elsewhere", {}).get("auto"), controls.get(_way(row))
        if own and control and row["task"] not in UNRELATED:
            yield row, control, own


def _way(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "model", "steps", "batch", *LORA))


def _lora(row: dict[str, Any]) -> str:
    targets = "" if row["targets"] == ALL else f", {row['targets']} alone"
    return f"rank {row['rank']}{targets}" + (", rsLoRA" if row["scaling"] == RSLORA else "")


def _lora_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in LORA)
