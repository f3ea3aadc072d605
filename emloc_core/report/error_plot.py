"""The error of every Linear as small plots: inline SVG, made of numbers only, so nothing needs escaping."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import median
from typing import Any

from markupsafe import Markup

#: A plot's own units: whole numbers keep a page of many plots small. The page scales it.
_WIDTH, _HEIGHT, _EDGE = 400, 100, 8
_PATH = re.compile(r"(?P<tower>.*?)\.?(?<![^.])(?P<block>\d+)\.(?P<kind>.+)")

Values = Sequence[float | None]


@dataclass(frozen=True)
class Strip:
    """The errors of one kind of Linear.

    Attributes:
        tower: path of the blocks: ``model.layers``.
        kind: path within a block: ``mlp.down_proj``; numbers in it, of experts, are ``*``.
        label: the shortest end of the kind that is unique in the tower: ``q_proj``, ``experts.down_proj``.
        values: relative error per block (the median over experts); None for dense, NaN for not a number.
    """

    tower: str
    kind: str
    label: str
    values: Values

    @property
    def middle(self) -> float | None:
        """The median over the blocks with a finite error; None without any."""
        numbers = finite(self.values)
        return median(numbers) if numbers else None

    @property
    def broken(self) -> int:
        """The number of blocks whose error is not a number."""
        return sum(map(_is_broken, self.values))

    @property
    def text(self) -> str:
        """The plot in words."""
        numbers = finite(self.values)
        phrases = [f"{self.kind}, {len(self.values)} blocks"]
        if numbers:
            phrases.append(f"{min(numbers):.3g} to {max(numbers):.3g}, median {median(numbers):.3g}")
        if self.broken:
            phrases.append(f"not a number in {self.broken}")
        return ": ".join(phrases[:2]) + "".join(f"; {more}" for more in phrases[2:])


def strips(errors: Mapping[str, float | None]) -> list[Strip]:
    """Return the errors of all Linears, by path, as one strip for each tower and kind, in the order of the paths."""
    by_kind: dict[tuple[str, str], dict[int, list[float | None]]] = {}
    blocks: dict[str, int] = {}
    for path, error in errors.items():
        match = _PATH.fullmatch(path)
        tower, block, kind = (match["tower"], int(match["block"]), match["kind"]) if match else ("", 0, path)
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", kind)
        by_kind.setdefault((tower, kind), {}).setdefault(block, []).append(error)
        blocks[tower] = max(blocks.get(tower, 0), block + 1)
    return [
        Strip(
            tower,
            kind,
            _short(kind, [other for beside, other in by_kind if beside == tower and other != kind]),
            [_middle(by_block.get(block, [])) for block in range(blocks[tower])],
        )
        for (tower, kind), by_block in by_kind.items()
    ]


def _short(kind: str, others: Sequence[str]) -> str:
    """Return the shortest end of a path, in whole parts, that no other path has."""
    parts = kind.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), kind)


def sparkline(values: Values, top: float) -> Markup:
    """Return a line through the blocks, from 0 at the bottom to ``top``; dense ones are gaps, NaN a vertical line."""
    points = [_point(x, value, top) for x, value in zip(_steps(len(values)), values, strict=True)]
    return _svg(line=_line(points), nan=_marks(values))


def band(strips: Sequence[Strip], top: float) -> Markup:
    """Return one small plot of all strips: from the least to the largest error of every block, and their median.

    Towers follow each other from left to right.
    """
    columns: list[list[float | None]] = []
    for tower in dict.fromkeys(strip.tower for strip in strips):
        within = [strip.values for strip in strips if strip.tower == tower]
        columns += [list(column) for column in zip(*within, strict=True)]
    steps = _steps(len(columns))
    by_step = {x: numbers for x, column in zip(steps, columns, strict=True) if (numbers := finite(column))}
    highest = [_point(x, max(numbers), top) for x, numbers in by_step.items()]
    lowest = [_point(x, min(numbers), top) for x, numbers in reversed(by_step.items())]
    middle = [_point(x, median(by_step[x]) if x in by_step else None, top) for x in steps]
    broken = [next(filter(_is_broken, column), None) for column in columns]
    return _svg(area=_line([*highest, *lowest]), line=_line(middle), nan=_marks(broken))


def finite(values: Iterable[Any]) -> list[float]:
    """Return the finite numbers among the values."""
    return [value for value in values if value is not None and math.isfinite(value)]


def _middle(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    if len(present) > len(finite(present)):
        return math.nan
    return median(present) if present else None


def _is_broken(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _steps(count: int) -> list[int]:
    room = _WIDTH - 2 * _EDGE
    return [_EDGE + round(room * (index / (count - 1) if count > 1 else 0.5)) for index in range(count)]


def _point(x: int, value: float | None, top: float) -> tuple[int, int] | None:
    if value is None or not math.isfinite(value):
        return None
    share = min(1, max(0, value / top if top else 0))
    return x, _HEIGHT - _EDGE - round((_HEIGHT - 2 * _EDGE) * share)


def _line(points: Iterable[tuple[int, int] | None]) -> str:
    """Return the path of a line with gaps; a single point is a dash."""
    parts = []
    for is_known, run in groupby(points, key=bool):
        if is_known:
            run_points = [point for point in run if point]
            (x, y), steps = run_points[0], pairwise(run_points)
            parts.append(f"M{x} {y}" if len(run_points) > 1 else f"M{x - _EDGE} {y}h{2 * _EDGE}")
            parts += [f"l{after[0] - before[0]} {after[1] - before[1]}" for before, after in steps]
    return "".join(parts).replace(" -", "-")


def _marks(values: Values) -> str:
    steps = _steps(len(values))
    return "".join(f"M{x} 0v{_HEIGHT}" for x, value in zip(steps, values, strict=True) if _is_broken(value))


def _svg(**paths: str) -> Markup:
    drawn = "".join(f'<path class="{name}" d="{path}"/>' for name, path in paths.items() if path)
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none"'
    return Markup(f'<svg class="plot" {box} aria-hidden="true">{drawn}</svg>')
