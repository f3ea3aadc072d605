"""Several sources of rows, each with a weight: how often its rows are taken in one pass."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.errors import EmlocError

if TYPE_CHECKING:
    from emloc_core.data.row import Row

_WEIGHTED = re.compile(r"(?P<source>.+):(?P<weight>\d+(?:\.\d+)?)")


def parse_sources(texts: Sequence[str]) -> str | dict[str, float]:
    """Return sources as given on a command line: one by name, or several with their weights.

    Args:
        texts: ``SOURCE`` or ``SOURCE:WEIGHT``. What exists under the whole text has no weight.

    Raises:
        EmlocError: a source is given twice.
    """
    sources: dict[str, float] = {}
    for text in texts:
        match = None if Path(text).exists() else _WEIGHTED.fullmatch(text)
        source, weight = (match["source"], float(match["weight"])) if match else (text, 1.0)
        if source in sources:
            raise _given_twice(source)
        sources[source] = weight
    return texts[0] if list(sources.items()) == [(texts[0], 1.0)] else sources


def _given_twice(source: str) -> EmlocError:
    return EmlocError(f"{source} is given twice.", f"Give it once, with a weight: {source}:2, or in Python a mapping.")


def weights(source: Any) -> dict[str, float] | None:
    """Return the sources of a mixture with their weights; None for one source, or for rows in memory, in splits or not.

    Raises:
        EmlocError: a weight is not a positive number, or a source is given twice.
    """
    if isinstance(source, list | tuple) and source and all(isinstance(item, str | Path) for item in source):
        names = [str(item) for item in source]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise _given_twice(twice[0])
        return dict.fromkeys(names, 1.0)
    if not isinstance(source, Mapping) or is_splits(source):
        return None
    for name, weight in source.items():
        good = isinstance(weight, int | float) and not isinstance(weight, bool) and isfinite(weight) and weight > 0
        if not good:
            raise EmlocError(f"The weight of {name} is {weight!r}, not a number above 0.", "Correct it.")
    return {str(name): float(weight) for name, weight in source.items()}


def is_splits(source: Any) -> bool:
    """Return whether a source is a ``DatasetDict``: data sets by the names of their splits."""
    return isinstance(source, Mapping) and any(hasattr(dataset, "column_names") for dataset in source.values())


def weighted(rows: "Sequence[Row]", weight: float) -> "Iterable[Row]":
    """Yield every row as often as the weight says; for its fraction, a share of the rows, chosen by their content.

    Args:
        weight: 2 yields every row twice, 0.25 a quarter of them, 1.5 every row and half of them once more.
    """
    times, share = int(weight), weight % 1
    order = sorted(range(len(rows)), key=lambda index: hashlib.sha256(f"share:{rows[index].key}".encode()).digest())
    more = set(order[: round(share * len(rows))])
    for index, row in enumerate(rows):
        for _ in range(times + (index in more)):
            yield row
