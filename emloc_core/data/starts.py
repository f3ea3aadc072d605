"""Where an answer starts among the tokens of prompt and answer: after those that the prompt alone begins with too.

Its last token may merge with the answer's first, so their numbers are compared and not counted. Only the end of a
prompt is tokenized twice: the rest is the same in both.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

#: Where one word ends and the next begins; and a token that holds both, of a tokenizer that tells them apart nowhere.
_BETWEEN_WORDS, _BOTH = re.compile(r"(?<=\w) (?=\w)"), re.compile(r"[^\W_ĠĊ][Ġ▁ ]")
#: Characters at the end of a prompt among which a word's beginning is looked for.
_END = 40


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
    known = _tokenized({part for each in parts for part in each}, tokenizer)
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


def starts_in_texts(prompts: Sequence[str], encoded: BatchEncoding, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return how many tokens every prompt has in common with its prompt and answer.

    Where no token holds both a word and the space behind it, what comes before a space does not depend on what follows.

    Args:
        encoded: prompts and answers, tokenized.
    """
    apart = _tells_words_apart(tokenizer, len(tokenizer))
    ends = [_last_words(prompt, encoded, row) if apart else (0, 0) for row, prompt in enumerate(prompts)]
    ids: Any = encoded["input_ids"]
    known = _tokenized({prompt[at:] for prompt, (_, at) in zip(prompts, ends, strict=True) if at}, tokenizer)
    starts = [
        start + common_prefix(known[prompt[at:]], whole[start:]) if at else 0
        for prompt, (start, at), whole in zip(prompts, ends, ids, strict=True)
    ]
    # Some tokenizers put a space before whatever they are given, so an end has nothing in common.
    left = [row for row, (start, _) in enumerate(ends) if starts[row] <= start]
    whole_prompts: Any = tokenizer([prompts[row] for row in left])["input_ids"] if left else []
    for row, prompt in zip(left, whole_prompts, strict=True):
        starts[row] = common_prefix(prompt, ids[row])
    return starts


@lru_cache(maxsize=1)
def _tells_words_apart(tokenizer: PreTrainedTokenizerBase, _size: int) -> bool:
    """Return whether no token holds both a word and the space behind it, and characters of tokens are known."""
    return tokenizer.is_fast and not any(map(_BOTH.search, tokenizer.get_vocab()))


def _last_words(prompt: str, encoded: BatchEncoding, row: int) -> tuple[int, int]:
    """Return the token and the character with which a prompt's last words begin; 0 and 0 if that is unclear."""
    found = _BETWEEN_WORDS.search(prompt, max(1, len(prompt) - _END))
    token = encoded.char_to_token(row, found.end()) if found else None
    span = None if token is None else encoded.token_to_chars(row, token)
    if found is None or token is None or span is None or span.start < found.start():
        return 0, 0
    return token, found.start()


def _tokenized(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Return the tokens of each text by itself."""
    distinct = list(texts)
    fast: Any = tokenizer
    if fast.is_fast and distinct:  # without the places of tokens, which take a quarter of the time
        fast("")  # resets what the backend cuts and pads
        found = fast.backend_tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
        return {text: each.ids for text, each in zip(distinct, found, strict=True)}
    ids: Any = tokenizer(distinct, add_special_tokens=False)["input_ids"] if distinct else []
    return dict(zip(distinct, ids, strict=True))


def common_prefix(some: list[int], others: list[int]) -> int:
    """Return the number of equal items at the start of two lists."""
    for length, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return length
    return min(len(some), len(others))
