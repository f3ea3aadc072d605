"""The rows of stage 2: those to train on, and those to evaluate while it trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from emloc_core.data.row import Row
from emloc_core.data.rows import CALIBRATION, SELECTION, Skipped, load_rows, without
from emloc_core.data.sets import share_of
from emloc_core.errors import EmlocError
from emloc_core.model.opened import OpenModel
from emloc_core.requests import EvalRows, PolishRequest, TrainRequest
from emloc_core.settings import StepSettings
from emloc_core.stages.rows import held_out_share, requested_rows


class TuningRows(NamedTuple):
    """Rows by their purpose.

    Attributes:
        evaluated: rows to evaluate; none has the content of a row to train on.
        excluded: how many rows of the data are left out, since an emulator keeps them, or the user excludes them.
    """

    train: list[Row]
    evaluated: list[Row]
    excluded: int
    skipped: list[Skipped]


def tuning_rows(request: TrainRequest | PolishRequest, model: OpenModel, settings: StepSettings) -> TuningRows:
    """Read the rows of a request.

    Args:
        model: the model that is trained. The rows that it keeps, if it is an emulator, are left out.

    Raises:
        EmlocError: rows cannot be read, the model cannot learn from them, or none is left.
    """
    paths = [model.checkpoint.directory / name for name in (CALIBRATION, SELECTION)]
    reserved = [path for path in paths if path.is_file() and model.objective.keeps_rows]
    rows, excluded, skipped = requested_rows(request, settings.loss, reserved)
    model.objective.require_rows(rows, model.family)
    if settings.learns_preferences:
        _require_preferences(rows, settings)
        if request.evaluation != EvalRows():
            raise EmlocError("Preferences are not evaluated while tuning.", "Leave out the rows to evaluate.")
    train, evaluated = divide(rows, request, settings, reserved)
    model.objective.require_rows(evaluated, model.family)
    if not evaluated and settings.patience is not None:
        raise EmlocError(
            "There are no rows to evaluate, so patience has no effect.",
            "Give --eval-data or --eval-split, or leave patience out.",
        )
    if not train:
        source = request.data if isinstance(request.data, str) else "the data"
        reason = f"all {excluded} are calibration, selection or excluded rows"
        reason = f"all {len(rows)} that are left are held out for evaluation" if rows else reason
        raise EmlocError(f"No row of {source} is left to train on: {reason}.", "Give more rows.")
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
    rows: list[Row], request: TrainRequest | PolishRequest, settings: StepSettings, reserved: Sequence[Path]
) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those to evaluate; no content is in both.

    Args:
        request: names the rows to evaluate.
        settings: the ``loss`` is read.
        reserved: files with rows that the emulator was made or will be corrected with: they are not evaluated.

    Raises:
        EmlocError: there is no row to evaluate, or the request names a split or a share that cannot be.
    """
    evaluation = request.evaluation
    if evaluation.data is None and evaluation.split is None:
        return rows, []
    share = held_out_share(evaluation, request.data)
    if share is not None:
        evaluated = share_of(rows, share)
    else:
        source = request.data if evaluation.data is None else evaluation.data
        evaluated = without(
            load_rows(source, evaluation.split or request.split, settings.loss, request.columns), reserved
        )
    if not evaluated:
        raise EmlocError("No row is left to evaluate.", "Give others with --eval-data, or a larger share.")
    keys = {row.key for row in evaluated}
    return [row for row in rows if row.key not in keys], evaluated
