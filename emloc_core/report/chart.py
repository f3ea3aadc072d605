"""Lines over steps, with axes: inline SVG that scales with the page and follows its colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

#: The drawing's own units: the page scales it.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 240, 68, 12, 10, 40
#: Gaps between ticks that are easy to read, times a power of ten; and about how many ticks there are.
_GAPS, _TICKS = (1, 2, 2.5, 5, 10), 4


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        points: (step, value); values that are not finite are left out.
        marked: whether each point has a mark, for example if there are few.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marked: bool = False


def chart(lines: Sequence[Line], across: str, up: str) -> Markup:
    """Return a chart of the lines, with a legend if there are several; nothing without a point.

    Args:
        lines: at most three.
        across: label of the steps.
        up: label of the values.
    """
    shown = [Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.marked) for line in lines]
    shown = [line for line in shown if line.points]
    if not shown:
        return Markup()
    xs, ys = ([point[axis] for line in shown for point in line.points] for axis in (0, 1))
    columns, rows = _ticks(min(xs), max(xs), whole=True), _ticks(min(ys), max(ys))
    parts = []
    for y in rows:
        height = _y(y, rows)
        parts.append(f'<path class="grid" d="M{_LEFT} {height}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{height + 4}" text-anchor="end">{y:.6g}</text>')
    for x in columns:
        parts.append(f'<text x="{_x(x, columns)}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:.6g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text x="12" y="{(_HEIGHT - _BOTTOM + _TOP) / 2}" transform="rotate(-90 12 '
                 f'{(_HEIGHT - _BOTTOM + _TOP) / 2})" text-anchor="middle">{escape(up)}</text>')  # fmt: skip
    for number, line in enumerate(shown):
        points = [(_x(x, columns), _y(y, rows)) for x, y in line.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        parts.append(f'<path class="line of-{number}" d="{path}"/>')
        if line.marked or len(points) == 1:
            parts += [f'<circle class="of-{number}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in points]
    description = ", ".join(f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in shown)
    drawn = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">'
    legend = "".join(f'<li class="of-{number}">{escape(line.name)}</li>' for number, line in enumerate(shown))
    return Markup(f"{drawn}{''.join(parts)}</svg>" + (f'<ul class="legend">{legend}</ul>' if len(shown) > 1 else ""))


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return ticks at even gaps that begin at or below ``low`` and end at or above ``high``."""
    if low == high:
        low, high = (low - 1, high + 1) if whole else (low - abs(low) / 10 - 1e-3, high + abs(high) / 10 + 1e-3)
    rough = (high - low) / _TICKS
    power = 10 ** math.floor(math.log10(rough))
    gap = next(step * power for step in _GAPS if step * power >= rough)
    if whole:
        gap = max(1, math.ceil(gap))
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [number * gap for number in range(first, last + 1)]


def _x(value: float, ticks: Sequence[float]) -> float:
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)


def _y(value: float, ticks: Sequence[float]) -> float:
    share = (value - ticks[0]) / (ticks[-1] - ticks[0])
    return round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share, 1)
