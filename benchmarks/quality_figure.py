"""The figures of ``docs/evidence.md``: recovery over memory and over parameters; the loss of the base over time.

``python benchmarks/quality_figure.py`` draws them from the results that are there.
"""

import json
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from harness import RESULTS
from quality_cells import BATCH, FULL, LORA, MODELS, OFFERED, PARAMETERS, STEPS, USUAL_LORA, Cell
from quality_rows import TEXTS

DOCS = RESULTS.parents[1] / "docs"
#: Task whose losses are drawn over time.
TIMED = "arithmetic"
#: Kind and memory of the ways that are drawn over time.
_TIMED = (
    (FULL, 1), ("nf4", 0.28), ("trellis", 0.17), ("low-rank-nf4", 0.11), ("low-rank", 0.28),
    ("low-rank-paper", 0.28),
)  # fmt: skip


def draw(recovery: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], wider: Sequence[dict[str, Any]]) -> None:
    """Draw ``docs/recovery.svg``, ``docs/loss.svg`` and ``docs/trend.svg``.

    Args:
        recovery: means over seeds, see ``quality_report.py``.
        rows: the measurements, each at the learning rate that is best for its way.
        wider: recovery with other models and lengths, see ``quality_wider.py``.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figures = (("recovery", _draw_recovery, recovery), ("loss", _draw_loss, rows), ("trend", _draw_trend, wider))
    for name, draw_on, data in figures:
        drawing = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasSVG(drawing)
        axes = drawing.subplots()
        draw_on(axes, data)
        axes.spines[["top", "right"]].set_visible(False)
        with rc_context({"svg.hashsalt": name}):  # the same figure is the same file
            drawing.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


def _draw_recovery(axes: Any, recovery: Sequence[dict[str, Any]]) -> None:
    """Draw means over the tasks with text."""
    recoveries: dict[tuple[str, float], list[float]] = {}
    for row in recovery:
        if row["task"] in TEXTS:
            recoveries.setdefault((row["system"], row["memory"]), []).append(row["mean"])
    means = {way: mean(values) for way, values in recoveries.items() if len(values) == len(TEXTS)}
    lines = {
        "emloc+polish20": "recommended, and 20 exact steps", "emloc": "recommended",
        "low-rank+auto": "factors in 16 bits", "low-rank-paper+paper": "as in the paper",
    }  # fmt: skip
    for system, label in lines.items():
        points = sorted((memory, value) for (name, memory), value in means.items() if name == system and memory < 0.6)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="memory of the blocks' weights, as a share of 16 bits", ylabel="recovery", xlim=(0.05, 0.32))
    axes.legend(frameon=False, loc="lower right")


def _draw_loss(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the loss of the base over the seconds until there is a LoRA that gives it; one task, the first seed."""
    by_way = {
        (row["kind"], row["memory"]): row
        for row in rows
        if (row["task"], row["seed"], row["steps"]) == (TIMED, 0, 60) and "stages" in row
    }
    for way in _TIMED:
        if way in by_way:
            label = "a LoRA on the base" if way[0] == FULL else f"{way[0]} at {way[1]:g}"
            axes.plot(*zip(*sorted(_times(by_way[way])), strict=True), marker="o", label=label)
    axes.set(xlabel="seconds on one core, all stages", ylabel="loss of the base per token", xscale="log", yscale="log")
    for axis, ticks in ((axes.xaxis, (300, 500, 1000, 2000)), (axes.yaxis, (0.2, 0.3, 0.5))):
        axis.set_major_locator(_locator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.legend(frameon=False)


def _draw_trend(axes: Any, wider: Sequence[dict[str, Any]]) -> None:
    """Draw the recovery over the parameters of the base, with its 95 % intervals; of the usual LoRA and steps."""
    usual = [row for row in wider if tuple(row[name] for name in ("task", "steps", "batch", *LORA))
             == (TIMED, STEPS, BATCH, *USUAL_LORA) and row["kind"] in OFFERED]  # fmt: skip
    for memory in sorted({row["memory"] for row in usual}):
        points = sorted(
            (PARAMETERS[row["model"]], row["auto"], row["reach"]) for row in usual if row["memory"] == memory
        )
        if len(points) < len({row["model"] for row in usual}):
            continue
        sizes, values, reaches = zip(*points, strict=True)
        axes.errorbar(sizes, values, yerr=reaches, marker="o", capsize=3, label=f"memory {memory:g}")
    models = {row["model"] for row in usual}
    axes.set(xlabel="parameters of the base", ylabel="recovery, corrected", xscale="log")
    axes.margins(x=0.15)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks([PARAMETERS[model] for model in models], [MODELS[model] for model in models])
    axes.xaxis.set_minor_formatter("")
    axes.legend(frameon=False, loc="lower right")


def _locator(ticks: Sequence[float]) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(ticks)


def _times(row: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """Yield the seconds of the stages up to every system of a cell, and the base's loss with it."""
    ways = {row["kind"]: ("train",), "uncorrected": ("compress", "train"), "auto": ("compress", "train", "auto")}
    ways["polish20"] = (*ways["auto"], "polish20")
    for system, stages in ways.items():
        if system in row["systems"] and all(stage in row["stages"] for stage in stages):
            yield sum(row["stages"][stage]["seconds"] for stage in stages), row["systems"][system]["nll"]


if __name__ == "__main__":
    from quality_table import Table

    results = json.loads((RESULTS / "quality.json").read_text())
    usual = [row for row in results["rows"] if not Cell.from_row(row).is_wider]
    draw(results["recovery"], Table(usual).best, results["wider"])
