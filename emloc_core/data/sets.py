"""The disjoint sets that rows are divided into, by their content."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from emloc_core.data.row import Row
from emloc_core.errors import EmlocError


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
