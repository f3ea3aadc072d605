"""Where an answer starts among the tokens of a conversation: after the tokens that the prompt alone begins with too.

The prompt's last token may merge with the answer's first, so token ids are compared, not counted.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase


def tokenized_with_starts(
    prompts: Sequence[str], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], int]]:
    """Return the tokens of every conversation, and how many of them its prompt has in common with it.

    A tokenizer finds special tokens (``<|im_start|>``, say) before it splits the rest. So the part of a prompt before
    its last special token is tokenized by itself, once for several answers; and so is the part from there on, the same
    few words in most rows.
    """
    special = _special_tokens(tokenizer, len(tokenizer))
    parts = []
    for prompt, text in zip(prompts, texts, strict=True):
        split = 0
        if text.startswith(prompt):
            split = max((match.start() for match in special.finditer(prompt)), default=0)
        parts.append((text[:split], text[split:], prompt[split:]))
    ids = token_ids({part for group in parts for part in group}, tokenizer, special=False)
    return [(ids[head] + ids[tail], len(ids[head]) + common_prefix(ids[end], ids[tail])) for head, tail, end in parts]


@lru_cache(maxsize=1)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, _size: int) -> re.Pattern[str]:
    """Return the pattern of the special tokens before which a text can be divided."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()
              if token.special and not (token.normalized or token.single_word or token.lstrip)]  # fmt: skip
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def token_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> dict[str, list[int]]:
    """Return the tokens of each text by itself.

    Args:
        special: whether the tokenizer puts special tokens around a text.
    """
    distinct = list(texts)
    fast: Any = tokenizer
    if fast.is_fast:  # without the positions of tokens, which take a quarter of the time
        fast("")  # resets what the backend cuts and pads
        encodings = fast.backend_tokenizer.encode_batch_fast(distinct, add_special_tokens=special)
        return {text: encoding.ids for text, encoding in zip(distinct, encodings, strict=True)}
    ids: Any = tokenizer(distinct, add_special_tokens=special)["input_ids"]
    return dict(zip(distinct, ids, strict=True))


def common_prefix(some: list[int], others: list[int]) -> int:
    """Return the number of equal items at the start of two lists."""
    for length, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return length
    return min(len(some), len(others))
