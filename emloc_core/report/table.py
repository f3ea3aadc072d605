"""The table that compares systems, for the terminal, Markdown and JSON, and its conclusion in a sentence."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from emloc_core.units import counted, human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table

#: Systems in the order of the table; others come after these.
ORDER = (
    "base", "emulator", "emulator+lora", "base+uncorrected", "base+corrected", "base+polished", "merged", "exact_alone",
    "full_lora",
)  # fmt: skip
#: Columns that are not metrics, with their headings.
COSTS = {"seconds": "time", "peak_bytes": "peak memory"}
#: lm-eval's metrics for which lower is better, unless the task (``metrics``) says otherwise.
LOWER = {"nll", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"}

Systems = Mapping[str, Mapping[str, Any]]
Metrics = Mapping[str, Mapping[str, Any]]


def rows(systems: Systems, metrics: Metrics | None = None) -> list[dict[str, Any]]:
    """Return the table as plain rows, in the canonical order.

    Args:
        systems: name -> metrics by name, ``seconds`` and ``peak_bytes``, as in ``results.json``.
        metrics: name -> ``higher_is_better`` (True, False, or None if unknown), as in ``results.json``.

    Returns:
        Rows with ``system``, every metric (None if a system has no value), ``seconds``, ``peak_bytes``, and ``best``:
        the columns in which the row has the best value.
    """
    columns = _columns(systems)
    names = sorted(systems, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    best = {column: _best(systems, column, _direction(column, metrics)) for column in columns}
    return [
        {
            "system": name,
            **{column: systems[name].get(column) for column in columns},
            "best": [c for c in columns if best[c] is not None and systems[name].get(c) == best[c]],
        }
        for name in names
    ]


def markdown(systems: Systems, metrics: Metrics | None = None) -> str:
    """Return the table in Markdown, with the best value of each column in bold. Arguments as for :func:`rows`."""
    columns = _columns(systems)
    lines = [
        "| system | " + " | ".join(_heading(column, metrics) for column in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for row in rows(systems, metrics):
        cells = [f"**{_text(c, row[c])}**" if c in row["best"] else _text(c, row[c]) for c in columns]
        lines.append(f"| {row['system']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(systems: Systems, metrics: Metrics | None = None) -> "Table":
    """Return the table for a terminal; the best values are bold and starred. Arguments as for :func:`rows`."""
    from rich.table import Table

    columns = _columns(systems)
    shown = Table()
    shown.add_column("system", no_wrap=True)
    for column in columns:
        shown.add_column(_heading(column, metrics), justify="right")
    for row in rows(systems, metrics):
        cells = [f"[bold green]{_text(c, row[c])}*[/]" if c in row["best"] else f"{_text(c, row[c])} " for c in columns]
        shown.add_row(row["system"], *cells)
    return shown


def note(results: Mapping[str, Any]) -> str:
    """Return one line on what was measured: tasks, rows, the meaning of arrows and nll."""
    tasks = ", ".join(f"{name} ({counted(task['rows'], 'row')})" for name, task in sorted(results["tasks"].items()))
    loss = " nll: mean loss per token, in nats." if any(_is_nll(name) for name in results["metrics"]) else ""
    return f"Tasks: {tasks}.{loss} ↓ lower is better, ↑ higher is better."


def conclusion(results: Mapping[str, Any]) -> str:
    """Return what the table shows about the adapter on the base, or an empty string.

    For the first column: what the corrected and uncorrected adapters gain over the base, as a share of an ordinary
    LoRA's gain if one was evaluated; and whether the clamp chosen is 0.
    """
    systems, metrics = results["systems"], results.get("metrics")
    column = next((column for column in _columns(systems) if column not in COSTS), None)
    values = {name: row.get(column) for name, row in systems.items() if row.get(column) is not None}
    if column is None or not values.keys() >= {"base", "base+corrected"}:
        return ""
    base, full = values["base"], values.get("full_lora")
    gains = []
    for name in ("base+polished", "base+corrected", "base+uncorrected"):
        if name in values:
            share = f", {(base - values[name]) / (base - full):.0%} of it" if full not in (None, base) else ""
            gains.append(f"{name} {_text(column, values[name])}{share}")
    start = f"{_heading(column, metrics)}: base {_text(column, base)}"
    end = f", full LoRA {_text(column, full)} (the whole gain)" if full is not None else ""
    correction = results.get("correction", {})
    is_uncorrected = correction.get("clamp") == 0 and correction.get("scale", 1) == 1
    uncorrected = " The clamp chosen is 0: no correction did better on the held-out rows." if is_uncorrected else ""
    return f"{start}{end}; {'; '.join(gains)}.{uncorrected}"


def _columns(systems: Systems) -> list[str]:
    """Return the metrics, with every ``nll`` first, then the costs."""
    metrics = {column for row in systems.values() for column in row} - COSTS.keys()
    return [*sorted(metrics, key=lambda name: (not _is_nll(name), name)), *COSTS]


def _is_nll(column: str) -> bool:
    return column.rpartition(".")[2] == "nll"


def _direction(column: str, metrics: Metrics | None) -> bool | None:
    """Return whether higher is better, or None if unknown."""
    if column in COSTS:
        return False
    if metrics and column in metrics:
        return metrics[column]["higher_is_better"]
    return column.rpartition(".")[2].partition("(")[0] not in LOWER


def _best(systems: Systems, column: str, higher: bool | None) -> float | None:
    """Return the best value of a column, or None if there is nothing to compare."""
    values = [row[column] for row in systems.values() if row.get(column) is not None]
    values = [value for value in values if not math.isnan(value)]
    if higher is None or len(values) < 2 or min(values) == max(values):
        return None
    return max(values) if higher else min(values)


def _heading(column: str, metrics: Metrics | None) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[_direction(column, metrics)]
    return COSTS.get(column, f"{column}{arrow}")


def _text(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column in COSTS:
        return human_bytes(value) if column == "peak_bytes" else human_seconds(value)
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
