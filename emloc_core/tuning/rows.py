"""The rows of stage 2: those to train on, and those to evaluate while it trains."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from emloc_core.data.row import Row
from emloc_core.data.rows import CALIBRATION, SELECTION, Skipped, asked_rows, load_rows, without
from emloc_core.data.sets import share_of
from emloc_core.errors import EmlocError
from emloc_core.model.opened import OpenModel
from emloc_core.requests import EvalRows, PolishRequest, TrainRequest
from emloc_core.settings import StepSettings

_OTHER_ROWS = (
    "Give --eval-data alone for all its rows, or --eval-split alone, such as 0.05, to hold out some of --data."
)
_NUMBER = re.compile(r"\d*\.\d+")


class TuningRows(NamedTuple):
    """Rows by what they are for.

    Attributes:
        evaluated: to evaluate; none of them has the content of one that is trained on.
        excluded: how many rows of the data are left out, since an emulator keeps them, or the user excludes them.
    """

    train: list[Row]
    evaluated: list[Row]
    excluded: int
    skipped: list[Skipped]


def tuning_rows(request: TrainRequest | PolishRequest, model: OpenModel, settings: StepSettings) -> TuningRows:
    """Read the rows of a request.

    Args:
        model: what is trained on. The rows that it keeps, if it is an emulator, are left out.

    Raises:
        EmlocError: rows cannot be read, the model cannot learn from them, or none is left.
    """
    places = [model.checkpoint.directory / name for name in (CALIBRATION, SELECTION)]
    kept = [path for path in places if path.is_file() and model.objective.keeps_rows]
    rows, excluded, skipped = asked_rows(request, settings.loss, kept)
    model.objective.require_rows(rows, model.family)
    if settings.learns_preferences:
        _require_preferences(rows, settings)
        if request.evaluation != EvalRows():
            raise EmlocError("Preferences are not evaluated while tuning.", "Leave out the rows to evaluate.")
    train, evaluated = divide(rows, request, settings, kept)
    model.objective.require_rows(evaluated, model.family)
    if not evaluated and settings.patience is not None:
        raise EmlocError(
            "There are no rows to evaluate, so patience has no effect.",
            "Give --eval-data or --eval-split, or leave it out.",
        )
    if not train:
        source = request.data if isinstance(request.data, str) else "the data"
        why = f"all {excluded} are calibration, selection or excluded rows"
        why = f"all {len(rows)} that are left are held out for evaluation" if rows else why
        raise EmlocError(f"No row of {source} is left to train on: {why}.", "Give more rows.")
    return TuningRows(train, evaluated, excluded, skipped)


def _require_preferences(rows: Sequence[Row], settings: StepSettings) -> None:
    """Refuse rows that are no preferences between two texts, and for KTO have no label either."""
    objective: str = getattr(settings, "objective", "")
    labels = settings.learns_labels
    for row in rows:
        if labels and row.rejected is None and row.label is None:
            raise EmlocError(
                f"{row.name} does not say whether its answer is wanted.",
                "KTO needs rows of `prompt`, `completion` and `label` (true or false), or of `chosen` and `rejected`.",
            )
        if not labels and row.rejected is None:
            raise EmlocError(
                f"{row.name} has no rejected answer.",
                f"{objective.upper()} needs rows of `prompt`, `chosen` and `rejected`; train on answers alone with the "
                "objective sft.",
            )
        if row.images or row.tools:
            raise EmlocError(
                f"{row.name} has {'images' if row.images else 'tools'}, which preferences do not support here.",
                "Leave the row out, or use your own script.",
                code="unsupported",
            )


def divide(
    rows: list[Row], request: TrainRequest | PolishRequest, settings: StepSettings, kept: Sequence[Path]
) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those to evaluate; no content is in both.

    Args:
        request: with what it says of the rows to evaluate.
        settings: with the ``loss``.
        kept: files with rows that the emulator was made or will be corrected with: they are not evaluated.

    Raises:
        EmlocError: there is no row to evaluate.
    """
    asked = request.evaluation
    if asked.data is None and asked.split is None:
        return rows, []
    share = _share(asked)
    if share is not None:
        found = share_of(rows, share)
    else:
        source = request.data if asked.data is None else asked.data
        if asked.split is not None and isinstance(source, str) and Path(source).is_file():
            raise EmlocError(f"{source} is a file, which has no split {asked.split!r}.", _OTHER_ROWS)
        found = without(load_rows(source, asked.split or request.split, settings.loss, request.columns), kept)
    if not found:
        raise EmlocError("No row is left to evaluate.", "Give others with --eval-data, or a larger share.")
    keys = {row.key for row in found}
    return [row for row in rows if row.key not in keys], found


def _share(asked: EvalRows) -> float | None:
    """Return the share of the rows that are trained on to hold out; None if a split is named."""
    if asked.split is None or not _NUMBER.fullmatch(asked.split):
        return None
    if not 0 < float(asked.split) < 1:
        raise EmlocError(f"{asked.split} is not a share of the rows to hold out.", "Give one between 0 and 1.")
    if asked.data is not None:
        raise EmlocError(
            f"{asked.split} is a share of the training rows, but other rows to evaluate are named.", _OTHER_ROWS
        )
    return float(asked.split)
