"""Rows become model inputs: the same token ids, and the same tokens in the loss, as TRL's ``SFTTrainer`` makes.

The emulator must be fitted to what will be trained on, so this follows TRL to the token: the end-of-sequence token
that is added to plain text, the chat template, where the completion starts, truncation. A test compares the two.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from emloc_core.data import Row
from emloc_core.errors import EmlocError


@dataclass(frozen=True)
class Sample:
    """One sequence of T tokens.

    Attributes:
        input_ids: T token ids.
        completion_mask: T times 0 or 1: whether the token counts in the loss; all 1 for a row of text.
        row: the number of the row that it was made from.
    """

    input_ids: list[int]
    completion_mask: list[int]
    row: int

    def inputs(self, device: torch.device | str) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and an ``attention_mask`` of ones, both of shape (1, T), int64, on ``device``."""
        ids = torch.tensor([self.input_ids], dtype=torch.int64, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def model_limit(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model takes, where its config says so."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def encode(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    model_limit: int | None = None,
) -> list[Sample]:
    """Tokenize rows as TRL does, one sample a row.

    Args:
        rows: the rows.
        tokenizer: the model's.
        max_length: tokens after which a sequence is cut; None cuts nothing.
        model_limit: the longest sequence, in tokens, that the model was made for; None for no limit.

    Raises:
        EmlocError: a row cannot be tokenized, is longer than the model's limit, or nothing of it is left in the loss;
            the message names the row.
    """
    samples = []
    for row in rows:
        sample = tokenize(row, tokenizer, max_length, model_limit)
        if not any(sample.completion_mask):
            raise EmlocError(
                f"Row {row.number}: its prompt alone fills the {max_length} tokens of the maximum length.",
                "Raise the maximum length, shorten the prompt, or leave the row out.",
            )
        samples.append(sample)
    return samples


def tokenize(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, model_limit: int | None = None
) -> Sample:
    """Tokenize one row, as :func:`encode` does; truncation may leave it without any token that counts.

    Raises:
        EmlocError: the row cannot be tokenized, or is longer than the model's limit.
    """
    ids, start = _conversation(row, tokenizer) if row.form == "conversation" else _plain(row, tokenizer)
    if start >= len(ids):
        raise EmlocError(f"Row {row.number}: the tokenizer leaves nothing of it to learn.", "Leave the row out.")
    length = len(ids) if max_length is None else min(len(ids), max_length)
    if model_limit is not None and length > model_limit:
        raise EmlocError(
            f"Row {row.number}: {length} tokens, and the model takes {model_limit}.",
            f"Set a maximum length of {model_limit} or less to cut it, or leave the row out.",
        )
    mask = [0] * start + [1] * (len(ids) - start)
    return Sample(ids[:length], mask[:length], row.number)


def _plain(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Return the ids of text, or of prompt and completion in one string, and where the completion starts."""
    prompt = "" if row.text is not None else row.prompt
    text = row.text if row.text is not None else row.completion
    assert isinstance(prompt, str)
    assert isinstance(text, str)
    if tokenizer.eos_token is None:
        raise EmlocError(
            "The tokenizer has no end-of-sequence token, so a model could not learn where an answer ends.",
            "Set eos_token in the model's tokenizer_config.json.",
        )
    if not text.endswith(tokenizer.eos_token):
        text += tokenizer.eos_token
    ids = tokenizer(text=prompt + text)["input_ids"]
    # By comparing ids, not by the prompt's length alone: its last token may have merged with the completion's first.
    start = 0 if row.text is not None else _common_prefix(tokenizer(text=prompt)["input_ids"], ids)
    return ids, start


def _conversation(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Return the ids of the conversation by the tokenizer's chat template, and where the completion starts."""
    assert isinstance(row.prompt, list)
    assert isinstance(row.completion, list)
    if not tokenizer.chat_template:
        raise EmlocError(
            f"Row {row.number} is a conversation, and the model's tokenizer has no chat template.",
            "Use a model tuned for chat, add a chat_template, or give prompt and completion as strings.",
        )

    def render(messages: list[dict[str, str]], **settings: Any) -> list[int]:
        encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)
        return encoded["input_ids"]

    try:
        ids = render(row.prompt + row.completion)
        return ids, _common_prefix(render(row.prompt, add_generation_prompt=True), ids)
    except (TemplateError, ValueError) as error:
        raise EmlocError(
            f"Row {row.number}: the model's chat template refuses it ({error}).",
            "Correct the roles and their order, or leave the row out.",
        ) from error


def _common_prefix(some: list[int], others: list[int]) -> int:
    for length, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return length
    return min(len(some), len(others))
