"""Rows as the data set that TRL trains on: tokenized beforehand, or with images that are decoded as they are used."""

from collections.abc import Sequence
from typing import Any

import numpy
from datasets import Dataset
from transformers import ProcessorMixin
from transformers.utils.logging import tqdm

from emloc_core.data.rows import Row
from emloc_core.data.tokenize import Processing, tokenize, trl_example
from emloc_core.errors import EmlocError


def make_dataset(
    rows: Sequence[Row], processing: Processing, max_length: int | None, model_limit: int | None
) -> tuple[Dataset, list[int]]:
    """Return the data set, and the tokens of each of its rows: those of which truncation leaves no answer are dropped.

    Every row is tokenized for it once, those with images too: what cannot be trained on is found before training
    starts, and images are never cut (they stand in the prompt, of which no part is cut where a completion is left).

    Args:
        rows: of one source.
        processing: see :func:`emloc_core.data.tokenize.load_processing`.
        max_length: tokens after which a row is cut; None cuts nothing.
        model_limit: the longest row, in tokens, that the model was made for; None for no limit.

    Raises:
        EmlocError: a row cannot be tokenized or is longer than the model's limit, or nothing is left of any row.
    """
    kept: list[Row] = []
    columns: dict[str, list[Any]] = {"input_ids": [], "completion_mask": []}
    for row in tqdm(rows, desc="Reading rows", unit=" rows", delay=1):  # with images it may take minutes
        sample = tokenize(row, processing, max_length, model_limit)
        if any(sample.completion_mask):
            kept.append(row)
            columns["input_ids"].append(numpy.asarray(sample.input_ids, dtype=numpy.int32))
            columns["completion_mask"].append(numpy.asarray(sample.completion_mask, dtype=numpy.int8))
    if not kept:
        prompt = "prompt with its images" if rows[0].images else "prompt"
        raise EmlocError(
            f"Every row's {prompt} alone fills the {max_length} tokens of the maximum length.",
            "Raise the maximum length.",
        )
    lengths = [len(ids) for ids in columns["input_ids"]]
    if isinstance(processing, ProcessorMixin):
        return _with_images(kept), lengths
    if kept[0].form == "text":
        del columns["completion_mask"]
    return Dataset.from_dict(columns), lengths


def _with_images(rows: Sequence[Row]) -> Dataset:
    """Return a data set for TRL's own collator. It stores the rows' numbers: Arrow would pad the parts of messages."""

    def examples(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [trl_example(rows[index]) for index in batch["row"]]
        return {column: [example[column] for example in found] for column in found[0]}

    return Dataset.from_dict({"row": range(len(rows))}).with_transform(examples)
