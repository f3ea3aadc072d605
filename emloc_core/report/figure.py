"""The figure of a run: the loss while tuning, and the emulator's error through the layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc_core.report.towers import place, short_names

#: Okabe and Ito's colours, which can be distinguished with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: Lines differ by more than colour, for greyscale prints.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLES = ("-", "--", "-.", ":")


def figure(
    path: Path,
    loss_histories: Mapping[str, Sequence[tuple[int, float]]],
    layer_errors: Sequence[Mapping[str, Any]],
) -> None:
    """Draw a run: the loss while tuning on the left, the emulator's error through the layers on the right.

    Args:
        path: where to save; the suffix chooses the format (``.png``, ``.svg``, ``.pdf``).
        loss_histories: for each tuning (``emulator``, ``full LoRA``), its steps and losses.
        layer_errors: module ``path`` and ``relative_error`` ``||(W - What) X|| / ||W X||`` of each Linear, in execution
            order; None, for Linears that stayed dense, is left out. One line is drawn per tower and last part of the
            paths.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 4), layout="constrained")  # not pyplot: no global state, no display
    FigureCanvasAgg(drawing)
    left, right = drawing.subplots(1, 2)
    _draw_losses(left, loss_histories)
    _draw_errors(right, layer_errors)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if left.lines:
        left.legend(frameon=False, fontsize="small")
    if right.lines:  # beside the plot, which is full for a real model
        right.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)


def _draw_losses(axes: Any, histories: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    axes.set(title="Loss while tuning", xlabel="step", ylabel="loss (nats per token)")
    for number, (name, history) in enumerate(histories.items()):
        if history:
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": _STYLES[number % len(_STYLES)]}
            marker = "o" if len(history) == 1 else None  # a line through one point cannot be seen
            axes.plot(*zip(*history, strict=True), label=name, linewidth=1.8, marker=marker, **style)


def _draw_errors(axes: Any, errors: Sequence[Mapping[str, Any]]) -> None:
    axes.set(title="Output error of the emulator's layers", xlabel="layer", ylabel="relative error")
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}  # per tower and last part of the paths
    for error in errors:
        if error.get("relative_error") is not None:
            tower, block, name = place(str(error["path"]))
            points = lines.setdefault((tower, name), [])
            points.append((len(points) if block is None else block, float(error["relative_error"])))
    names = short_names(list(dict.fromkeys(tower for tower, _ in lines)))
    for number, ((tower, name), points) in enumerate(lines.items()):
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": _MARKERS[(number + number // len(COLOURS)) % len(_MARKERS)],  # other pairs after the last colour
            "linestyle": _STYLES[list(names).index(tower) % len(_STYLES)],
        }
        label = f"{names[tower]} {name}".strip()
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, markersize=4, **style)
