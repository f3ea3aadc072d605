"""Where an answer starts among the tokens of prompt and answer: after those that the prompt alone begins with too.

Its last token may merge with the answer's first, so their numbers are compared and not counted.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase


def tokenized_with_starts(
    asked: Sequence[str], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], int]]:
    """Return the tokens of every conversation, and how many of them its prompt has in common with it.

    Special tokens (``<|im_start|>``, say) are found before a text is split into others. So what comes before the last
    one of a prompt is tokenized by itself, once for several answers; and so is the end of a prompt that begins with it:
    the same few words in most rows.

    Args:
        asked: the prompts.
        texts: the conversations that begin with them.
    """
    special = _special_tokens(tokenizer, len(tokenizer))
    parts = []
    for prompt, text in zip(asked, texts, strict=True):
        at = 0
        if text.startswith(prompt):
            at = max((found.start() for found in special.finditer(prompt)), default=0)
        parts.append((text[:at], text[at:], prompt[at:]))
    known = token_ids({part for each in parts for part in each}, tokenizer, special=False)
    return [
        (known[head] + known[tail], len(known[head]) + common_prefix(known[end], known[tail]))
        for head, tail, end in parts
    ]


@lru_cache(maxsize=1)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, _size: int) -> re.Pattern[str]:
    """Return what finds those special tokens before which a text can be divided."""
    found = [token.content for token in tokenizer.added_tokens_decoder.values()
             if token.special and not (token.normalized or token.single_word or token.lstrip)]  # fmt: skip
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or r"(?!)")


def token_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> dict[str, list[int]]:
    """Return the tokens of each text by itself.

    Args:
        special: whether with the special tokens that the tokenizer puts around a text.
    """
    distinct = list(texts)
    fast: Any = tokenizer
    if fast.is_fast:  # without the places of tokens, which take a quarter of the time
        fast("")  # resets what the backend cuts and pads
        found = fast.backend_tokenizer.encode_batch_fast(distinct, add_special_tokens=special)
        return {text: each.ids for text, each in zip(distinct, found, strict=True)}
    ids: Any = tokenizer(distinct, add_special_tokens=special)["input_ids"]
    return dict(zip(distinct, ids, strict=True))


def common_prefix(some: list[int], others: list[int]) -> int:
    """Return the number of equal items at the start of two lists."""
    for length, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return length
    return min(len(some), len(others))
