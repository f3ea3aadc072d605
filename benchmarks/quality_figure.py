"""The figure of ``quality.py``: results over memory, over exact steps, and over time."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from harness import RESULTS
from quality_cells import EXACT, FULL, SCRATCH, TASKS

FIGURE = RESULTS.parents[1] / "docs" / "quality.svg"


def draw(recovery: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> None:
    """Draw ``docs/quality.svg``; a column for every task.

    Args:
        recovery: means over seeds, see ``quality_report.py``.
        rows: the measurements, each at the learning rate that is best for its way.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4 * len(TASKS), 10), layout="constrained")
    FigureCanvasSVG(drawing)
    grid = drawing.subplots(3, len(TASKS))
    ways = sorted({_way(row) for row in rows})  # of one colour in all columns
    colours = dict(zip(ways, itertools.cycle(colormaps["tab20"].colors), strict=False))
    for task, (over_memory, over_steps, over_time) in zip(TASKS, grid.T, strict=True):
        over_memory.set(title=task)
        _draw_memory(over_memory, [row for row in recovery if row["task"] == task])
        _draw_steps(over_steps, [row for row in recovery if row["task"] == task], colours)
        _draw_time(over_time, [row for row in rows if row["task"] == task and row["seed"] == 0], colours)
    lowest = min(axes.dataLim.ymin for axes in grid[:2].flat)
    for axes in grid[:2].flat:
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_ylim(lowest - 0.02, 1.04)
    for rows_of_axes, place in ((grid[:1], "upper"), (grid[1:], "center")):
        named = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in rows_of_axes.flat)
        handles = {label: handle for each in named for handle, label in each}
        drawing.legend(handles.values(), handles, loc=f"outside right {place}", frameon=False, fontsize="small")
    for axes, label in zip(grid[:, 0], ("recovery", "recovery", "NLL of the base with the LoRA"), strict=True):
        axes.set_ylabel(label)
    with rc_context({"svg.hashsalt": FIGURE.name}):  # the same figure is the same file
        drawing.savefig(FIGURE, metadata={"Date": None})


def _way(row: dict[str, Any]) -> str:
    return row["kind"] if row["memory"] == 1 else f"{row['kind']} at {row['memory']:g}"


def _draw_memory(axes: Any, recovery: Sequence[dict[str, Any]]) -> None:
    for system in ("emloc", "emloc+polish20", "low-rank+auto", "low-rank+polish20"):
        _line(axes, system, [(row["memory"], row) for row in recovery if row["system"] == system])
    axes.set(xlabel="memory of the block Linears", xlim=(0, 0.65))


def _draw_steps(axes: Any, recovery: Sequence[dict[str, Any]], colours: dict[str, Any]) -> None:
    by_name = {(row["system"], row["memory"]): row for row in recovery}
    kinds = dict.fromkeys((row["system"].rpartition("+")[0], row["memory"]) for row in recovery if row["memory"] < 1)
    for kind, memory in kinds:
        named = [(0, f"{kind}+auto"), *((steps, f"{kind}+polish{steps}") for steps in EXACT)]
        way = f"{kind} at {memory:g}"
        if way in colours:
            found = [(steps, by_name.get((system, memory))) for steps, system in named]
            _line(axes, way, [(steps, row) for steps, row in found if row], colours[way])
    axes.set(xlabel="exact steps", xticks=[0, *EXACT])


def _draw_time(axes: Any, rows: Sequence[dict[str, Any]], colours: dict[str, Any]) -> None:
    """Draw the loss of the base over the seconds until there is a LoRA that gives it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    points: dict[str, list[tuple[float, float]]] = {}
    for row in (row for row in rows if "stages" in row):
        points.setdefault(_way(row), []).extend(_times(row))
    for way, found in points.items():
        axes.plot(*zip(*sorted(found), strict=True), marker="o", label=way, color=colours[way])
    axes.set(xlabel="seconds", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def _times(row: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """Yield the seconds of the stages up to every system of a cell, and the base's loss with it."""
    stages = ("train",) if row["kind"] in (FULL, SCRATCH) else ("compress", "train")
    ways: dict[str, tuple[str, ...]] = {row["kind"]: stages, "uncorrected": stages}
    corrected = (*stages, "auto") if "auto" in row["stages"] else stages
    ways |= {"auto": corrected} | {f"polish{steps}": (*corrected, f"polish{steps}") for steps in EXACT}
    for system in ways.keys() & row["systems"].keys():
        yield sum(row["stages"][stage]["seconds"] for stage in ways[system]), row["systems"][system]["nll"]


def _line(axes: Any, label: str, points: Sequence[tuple[float, dict[str, Any]]], colour: Any = None) -> None:
    """Draw one system's means, with their spread over seeds."""
    points = sorted(points, key=lambda point: point[0])
    if points:
        x = [at for at, _ in points]
        y, spread = ([row[key] or 0 for _, row in points] for key in ("mean", "spread"))
        axes.errorbar(x, y, spread, marker="o", capsize=3, label=label, color=colour)
