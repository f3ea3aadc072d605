"""Rows of preferences as the datasets that TRL's DPO and KTO train on: two answers, or one that is wanted or not."""

from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig
from transformers.utils.logging import tqdm

from emloc_core.data.limits import Limits
from emloc_core.data.rows import Row
from emloc_core.data.tokenize import Processing, tokenize
from emloc_core.errors import EmlocError
from emloc_core.settings import StepSettings
from emloc_core.tuning.dataset import RowSize


def require_preferences(rows: Iterable[Row], settings: StepSettings) -> None:
    """Refuse rows that are no preferences between two texts, and for KTO have no label either.

    Raises:
        EmlocError: a row has no rejected answer, or no label, or has images or tools; names the first.
    """
    labels = getattr(settings, "objective", "") == "kto"
    for row in rows:
        if labels and row.rejected is None and row.label is None:
            raise EmlocError(
                f"Row {row.number} does not say whether its answer is wanted.",
                "KTO needs rows of `prompt`, `completion` and `label` (true or false), or of `chosen` and `rejected`.",
            )
        if not labels and row.rejected is None:
            raise EmlocError(
                f"Row {row.number} has no rejected answer.",
                "DPO needs rows of `prompt`, `chosen` and `rejected`; train on answers alone with the objective sft.",
            )
        if row.images or row.tools:
            raise EmlocError(
                f"Row {row.number} has {'images' if row.images else 'tools'}, which preferences do not take here.",
                "Leave the row out, or use your own script.",
                code="unsupported",
            )


def preference_dataset(
    rows: Sequence[Row],
    processing: Processing,
    max_length: int | None,
    config: PreTrainedConfig,
    settings: StepSettings,
) -> tuple[Dataset, list[RowSize]]:
    """Return the dataset and the size of each row. Rows whose prompt alone fills the maximum length are dropped.

    TRL tokenizes the rows itself, as :func:`emloc_core.data.tokenize.tokenize` does.

    Args:
        rows: rows with rejected answers.
        processing: the model's tokenizer.
        max_length: truncate prompt and answer to this many tokens; None for no truncation.
        config: of the model.
        settings: with the objective. KTO estimates how far the model has moved from neighbours in the dataset, so they
            are shuffled.

    Raises:
        EmlocError: a row cannot be tokenized or is longer than the model's limit, or no row is left.
    """
    limits = Limits.of(config)
    kept, sizes = [], []
    for row in tqdm(rows, desc="Reading rows", unit=" rows", delay=1):
        pair = [tokenize(each, processing, max_length, limits) for each in row.answers()]
        if all(any(sample.completion_mask) for sample in pair):
            kept.append(row)
            sizes.append(RowSize(sum(len(sample.input_ids) for sample in pair)))
    if not kept:
        raise EmlocError(
            f"Every row's prompt alone fills the {max_length} tokens of the maximum length.",
            "Raise the maximum length.",
        )
    if getattr(settings, "objective", "") == "kto":
        answers = [answer for row in kept for answer in row.answers()]
        named: dict[str, list[Any]] = {
            name: [getattr(answer, name) for answer in answers] for name in ("prompt", "completion", "label")
        }
        return Dataset.from_dict(named).shuffle(settings.seed), sizes
    columns: dict[str, list[Any]] = {
        "prompt": [row.prompt for row in kept],
        "chosen": [row.completion for row in kept],
        "rejected": [row.rejected for row in kept],
    }
    return Dataset.from_dict(columns), sizes
