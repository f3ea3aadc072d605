"""Rows of preferences as the datasets that TRL's DPO and KTO train on: two answers, or one that is wanted or not.

They are tokenized here, in batches and once; TRL would do it row by row. A test compares the two.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy
import pyarrow
import torch
from datasets import Dataset
from transformers import PreTrainedConfig
from transformers.utils.logging import tqdm

from emloc_core.data.limits import Limits
from emloc_core.data.row import Row
from emloc_core.data.tokenize import Processing, Sample, no_room_for_an_answer, tokenized
from emloc_core.objective import RowSize
from emloc_core.settings import StepSettings


def preference_dataset(
    rows: Sequence[Row],
    processing: Processing,
    max_length: int | None,
    config: PreTrainedConfig,
    settings: StepSettings,
) -> tuple[Dataset, list[RowSize]]:
    """Return the dataset, and the size of each row with its longer answer.

    Rows whose prompt alone fills the maximum length are dropped.

    Args:
        rows: rows with rejected answers.
        max_length: truncate prompt and answer to this many tokens; None for no truncation.
        settings: with the objective. KTO estimates how far the model has moved from neighbours in the dataset, so they
            are shuffled.

    Raises:
        EmlocError: a row cannot be tokenized or is longer than the model's limit, or no row is left.
    """
    answers = [row.answers() for row in rows]
    flat = list(chain.from_iterable(answers))
    samples = tokenized(flat, processing, max_length, Limits.for_config(config))
    watched = iter(tqdm(samples, desc="Reading rows", unit=" rows", total=len(flat), delay=1))
    of_rows = [[(answer.label, next(watched)) for answer in of_row] for of_row in answers]
    kept = [of_row for of_row in of_rows if all(any(sample.completion_mask) for _, sample in of_row)]
    if not kept:
        raise no_room_for_an_answer("Every row's", rows[0], max_length)
    sizes = [RowSize(max(len(sample.input_ids) for _, sample in of_row)) for of_row in kept]
    if settings.learns_labels:
        labelled = [pair for of_row in kept for pair in of_row]
        table = _table(("prompt_ids", "completion_ids"), (_divided([sample]) for _, sample in labelled))
        labels = pyarrow.array([label for label, _ in labelled])
        order = numpy.random.default_rng(settings.seed).permutation(len(labelled))  # as Dataset.shuffle does
        return Dataset(table.append_column("label", labels).take(order)), sizes
    pairs = (_divided([sample for _, sample in of_row]) for of_row in kept)
    return Dataset(_table(("prompt_ids", "chosen_ids", "rejected_ids"), pairs)), sizes


def _divided(samples: Sequence[Sample]) -> list[list[int]]:
    """Return the prompt that one or two answers have in common, and the rest of each."""
    start = min(sample.completion_mask.index(1) for sample in samples)
    return [samples[0].input_ids[:start], *(sample.input_ids[start:] for sample in samples)]


def _table(names: Sequence[str], rows: Iterable[Sequence[list[int]]]) -> pyarrow.Table:
    kind = pyarrow.list_(pyarrow.int32())
    columns = zip(*rows, strict=True)
    return pyarrow.table({name: pyarrow.array(column, kind) for name, column in zip(names, columns, strict=True)})


def with_mismatched(dataset: Dataset, batch_size: int) -> Dataset:
    """Return KTO's dataset with another answer for every prompt: the previous one's in its batch.

    From these it estimates how far the model has moved (arXiv 2402.01306, section 4.1).
    """
    rows = numpy.arange(len(dataset))
    first = rows - rows % batch_size
    last = numpy.minimum(first + batch_size, len(dataset)) - 1
    previous = numpy.where(rows == first, last, rows - 1)
    table = dataset.data.table.combine_chunks()
    return Dataset(table.append_column("KL_completion_ids", table["completion_ids"].take(previous)))


def odds_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """Return ORPO's loss: the loss of chosen answers, less the weighted log-sigmoid of the odds ratio.

    Hong et al., arXiv 2403.07691, equations 4, 6 and 7.

    Args:
        chosen, rejected: mean log-probability per token of each answer, (rows).
        beta: the weight, their lambda.
    """

    def log_odds(log_prob: torch.Tensor) -> torch.Tensor:
        below_one = log_prob.float().clamp(max=-1e-6)  # or the odds would be infinite
        return below_one - torch.log(-torch.expm1(below_one))

    ratio = log_odds(chosen) - log_odds(rejected)
    return (-chosen - beta * torch.nn.functional.logsigmoid(ratio)).mean()
