"""Rows as the dataset that TRL trains on: tokenized in advance, or with images that are decoded when needed."""

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy
import pyarrow
from datasets import Dataset
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.utils.logging import tqdm

from emloc_core.data.limits import Limits
from emloc_core.data.row import Row
from emloc_core.data.tokenize import Processing, Sample, no_room_for_an_answer, tokenized, trl_example
from emloc_core.model.image_shape import count_patches
from emloc_core.objective import RowSize
from emloc_core.settings import StepSettings


def make_dataset(
    rows: Sequence[Row],
    processing: Processing,
    max_length: int | None,
    config: PreTrainedConfig,
    *,
    completion_only: bool = True,
) -> tuple[Dataset, list[RowSize]]:
    """Return the dataset and the size of each row. Rows whose answer is truncated entirely are dropped.

    Every row is tokenized once, including those with images, so that rows that cannot be trained on are found before
    training starts. Images are never cut: they are in the prompt, which is complete if any completion is left.

    Args:
        processing: see :func:`emloc_core.data.tokenize.load_processing`.
        max_length: truncate rows to this many tokens; None for no truncation.
        completion_only: whether prompts are left out of the loss.

    Returns:
        ``input_ids`` and ``labels``, or with images the columns from which TRL's collator makes them; and the sizes.

    Raises:
        EmlocError: a row cannot be tokenized or is longer than the model's limit, or no row has an answer left.
    """
    kept: list[Row] = []
    sizes: list[RowSize] = []
    ids, mask = array("i"), bytearray()
    samples = tokenized(rows, processing, max_length, Limits.for_config(config))
    for row, sample in zip(rows, _watched(samples, len(rows)), strict=True):
        if any(sample.completion_mask):
            kept.append(row)
            pixels = sample.others.get("pixel_values")
            patches = 0 if pixels is None else count_patches(pixels.shape, config)
            sizes.append(RowSize(len(sample.input_ids), patches))
            ids.extend(sample.input_ids)
            mask += bytes(sample.completion_mask)
    if not kept:
        raise no_room_for_an_answer("Every row's", rows[0], max_length)
    if isinstance(processing, ProcessorMixin):
        return _with_images(kept), sizes
    ends = numpy.cumsum([0, *(size.tokens for size in sizes)], dtype=numpy.int32)
    tokens = numpy.frombuffer(ids, dtype=numpy.int32)
    labels = numpy.where(numpy.frombuffer(mask, dtype=bool), tokens, -100) if completion_only else tokens
    columns = {
        name: pyarrow.ListArray.from_arrays(ends, flat.astype(numpy.int32, copy=False))
        for name, flat in (("input_ids", tokens), ("labels", labels))
    }
    return Dataset(pyarrow.table(columns)), sizes


def _watched(samples: Iterable[Sample], total: int) -> Iterable[Sample]:
    """Show progress, if it takes long: with images it may be minutes."""
    return tqdm(samples, desc="Reading rows", unit=" rows", total=total, delay=1)


def measure(
    rows: Sequence[Row], processing: Processing, settings: StepSettings, config: PreTrainedConfig
) -> dict[str, Any]:
    """Return the lengths of rows, and the effect of a maximum length.

    Args:
        rows, processing, config: see :func:`make_dataset`.
        settings: the maximum length is read. Of preferences, the longer answer counts.

    Returns:
        See :meth:`emloc_core.objective.Objective.measure`.

    Raises:
        EmlocError: as :func:`make_dataset`, except where no row has an answer left.
    """
    limits, most = Limits.for_config(config), settings.max_length
    row_limits = limits if most is None else Limits(None, limits.vocabulary)
    answers = [row.answers() if settings.learns_preferences else (row,) for row in rows]
    flat = list(chain.from_iterable(answers))
    samples = iter(_watched(tokenized(flat, processing, None, row_limits), len(flat)))
    by_row = [[next(samples) for _ in of_row] for of_row in answers]
    lengths = [max(len(sample.input_ids) for sample in of_row) for of_row in by_row]
    longest = max(range(len(rows)), key=lengths.__getitem__)
    kept = [of_row for of_row in by_row if all(any(sample.completion_mask[:most]) for sample in of_row)]
    return {
        "longest_tokens": lengths[longest],
        "longest_row": rows[longest].name,
        "cut_rows": sum(length > most for length in lengths) if most else 0,
        "dropped_rows": len(rows) - len(kept),
        "duplicate_rows": len(rows) - len({row.key for row in rows}),
        "examples": sum(map(len, kept)) if settings.learns_labels else len(kept),
    }


def _with_images(rows: Sequence[Row]) -> Dataset:
    """Return a dataset for TRL's own collator. It stores row numbers, since Arrow would pad the parts of messages."""

    def examples(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        decoded = [trl_example(rows[index]) for index in batch["row"]]
        return {column: [example[column] for example in decoded] for column in decoded[0]}

    return Dataset.from_dict({"row": range(len(rows))}).with_transform(examples)
