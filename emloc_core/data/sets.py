"""The disjoint sets that rows are divided into, by their content."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.data.mixture import weights
from emloc_core.data.row import Row
from emloc_core.errors import EmlocError
from emloc_core.requests import EvalRows

_OTHER_ROWS = (
    "Give --eval-data alone for all its rows, or --eval-split alone, such as 0.05, to hold out some of --data."
)
_NUMBER = re.compile(r"\d*\.\d+")


@dataclass(frozen=True)
class Sets:
    """Rows for three purposes; no content is in more than one set."""

    calibration: list[Row]
    selection: list[Row]
    tuning: list[Row]


def draw(rows: Sequence[Row], seed: int, calibration: int, selection: int) -> Sets:
    """Divide rows by content into calibration, selection and tuning rows.

    The result depends on the seed and the contents only, not on the order of the rows. Calibration and selection rows
    are distinct: further copies of them are dropped, while copies of tuning rows are kept. A row that occurs twice, or
    has the weight 2, is drawn twice as early on average.

    Raises:
        EmlocError: there are fewer distinct rows than ``calibration + selection``.
    """
    copies: dict[str, list[Row]] = {}
    for row in rows:
        copies.setdefault(row.key, []).append(row)
    needed = calibration + selection
    if len(copies) < needed:
        raise EmlocError(
            f"{needed} distinct rows are needed, {calibration} for calibration and {selection} for selection, "
            f"but the data have {len(copies)} besides excluded ones.",
            "Give more rows, or keep fewer of them: --samples, --selection.",
        )

    def sort_key(key: str) -> bytes:
        names = (f"{seed}:{key}" if copy == 0 else f"{seed}:{key}:{copy}" for copy in range(len(copies[key])))
        return min(hashlib.sha256(name.encode()).digest() for name in names)

    order = sorted(copies, key=sort_key)
    return Sets(
        calibration=[copies[key][0] for key in order[:calibration]],
        selection=[copies[key][0] for key in order[calibration:needed]],
        tuning=[row for key in order[needed:] for row in copies[key]],
    )


def share_of(rows: Sequence[Row], share: float) -> list[Row]:
    """Return a share of the distinct rows, at least one, chosen by content; their copies are included."""
    keys = sorted({row.key for row in rows}, key=lambda key: hashlib.sha256(f"eval:{key}".encode()).digest())
    chosen = set(keys[: max(1, round(share * len(keys)))])
    return [row for row in rows if row.key in chosen]


def held_out_share(evaluation: EvalRows, data: Any) -> float | None:
    """Return the share of the rows that are trained on to hold out; None for other rows, or none.

    Args:
        data: the rows that are trained on; see :func:`emloc_core.data.rows.load_rows`. Nothing is read.

    Raises:
        EmlocError: it is no share, other rows are named too, or a split of a file.
    """
    split = evaluation.split
    if split is None:
        return None
    if not _NUMBER.fullmatch(split):
        source = data if evaluation.data is None else evaluation.data
        for name in weights(source) or [source]:
            if isinstance(name, str | Path) and Path(name).is_file():
                raise EmlocError(f"{name} is a file, which has no split {split!r}.", _OTHER_ROWS)
        return None
    if not 0 < float(split) < 1:
        raise EmlocError(f"{split} is not a share of the rows to hold out.", "Give one between 0 and 1.")
    if evaluation.data is not None:
        raise EmlocError(f"{split} is a share of the training rows, but other rows to evaluate are named.", _OTHER_ROWS)
    return float(split)
