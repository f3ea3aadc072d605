"""The rows that a request names."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from emloc_core.data.mixture import weights
from emloc_core.data.row import Row, Skipped
from emloc_core.data.rows import load_rows, without
from emloc_core.errors import EmlocError
from emloc_core.requests import EvalRows, RowsRequest
from emloc_core.settings import Loss

_OTHER_ROWS = (
    "Give --eval-data alone for all its rows, or --eval-split alone, such as 0.05, to hold out some of --data."
)
_NUMBER = re.compile(r"\d*\.\d+")


class RequestedRows(NamedTuple):
    """The rows that a request asks for.

    Attributes:
        excluded: how many are left out, because their content is in a file.
    """

    rows: list[Row]
    excluded: int
    skipped: list[Skipped]


def requested_rows(request: RowsRequest, loss: Loss, reserved: Iterable[Path] = ()) -> RequestedRows:
    """Read the rows of a request, without those that it excludes and those in files of an emulator (``reserved``).

    Raises:
        EmlocError: they cannot be read.
    """
    skipped: list[Skipped] = []
    collected = skipped if request.skip_bad_rows else None
    rows = load_rows(request.data, request.split, loss, request.columns, collected)
    included = without(rows, [*reserved, *request.exclude], request.split, request.columns)
    return RequestedRows(included, len(rows) - len(included), skipped)


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
