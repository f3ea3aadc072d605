"""Memory of each stage, as a table for the terminal and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emloc_core.memory.model import TERMS, Need
from emloc_core.report.figure import COLOURS
from emloc_core.units import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

#: Bars differ by more than colour, for greyscale prints.
_HATCHES = ("", "///", "", "\\\\\\", "", "...", "", "xxx", "++", "")
_HEADINGS = {"kv_cache": "KV cache"}


def memory_table(needs: Sequence[Need]) -> "Table":
    """Return the table for a terminal: one row per stage, one column per term that any stage has, and the sum."""
    from rich.table import Table

    terms = _terms(needs)
    shown = Table()
    shown.add_column("stage", no_wrap=True)
    for term in terms:
        shown.add_column(_heading(term), justify="right")
    shown.add_column("total", justify="right")
    shown.add_column("peak in", no_wrap=True)
    for need in needs:
        cells = [human_bytes(need.terms[term]) if term in need.terms else "-" for term in terms]
        shown.add_row(need.stage, *cells, f"[bold]{human_bytes(need.total)}[/]", need.phase)
    return shown


def print_memory(needs: Sequence[Need]) -> None:
    """Print the table on stdout."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(memory_table(needs))
    else:  # rich would fold the table to 80 columns in a file or a pipe
        Console(width=200).print(memory_table(needs))


def memory_figure(path: Path, needs: Sequence[Need], budget: int | None = None) -> None:
    """Draw one stacked bar per stage, and a line at the budget.

    Args:
        path: where to save; the suffix chooses the format (``.png``, ``.svg``, ``.pdf``).
        needs: the stages, drawn from top to bottom.
        budget: bytes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 0.6 * len(needs) + 1.6), layout="constrained")  # not pyplot: no global state
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    names = [need.stage for need in needs]
    left = [0.0] * len(needs)
    for term in _terms(needs):
        number = TERMS.index(term)
        widths = [need.terms.get(term, 0) / 1e9 for need in needs]
        axes.barh(names, widths, left=left, label=_heading(term), height=0.62, color=_colour(number),
                  hatch=_HATCHES[number], edgecolor="white", linewidth=0.5)  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, end in enumerate(left):
        axes.annotate(f"{end:.3g}", (end, row), (5, 0), textcoords="offset points", va="center", fontsize="small",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    if budget is not None:
        axes.axvline(budget / 1e9, color="black", linestyle="--", linewidth=1.2, label=f"budget {human_bytes(budget)}")
    axes.invert_yaxis()
    axes.set(xlabel="GB", title="Memory of every stage")
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)


def _terms(needs: Sequence[Need]) -> list[str]:
    return [term for term in TERMS if any(need.terms.get(term) for need in needs)]


def _heading(term: str) -> str:
    return _HEADINGS.get(term, term)


def _colour(number: int) -> str:
    return (*COLOURS, "#999999", "#5D3A9B", "#DDDDDD")[number]
