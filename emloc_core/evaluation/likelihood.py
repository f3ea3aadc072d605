"""Likelihoods of answers, from the logits of their own positions: those of whole rows would take gigabytes.

lm-eval computes all logits of a batch and their logarithms in fp32: of 8 rows of 1,000 tokens and a vocabulary of
150,000, 7 GB, which is more than a large model leaves free on the GPU that it was tuned on.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from emloc_core.data.tokenize import logits_at

#: What tells an answer's prompt from others, and the answer's token ids.
Answer = tuple[Any, list[int]]


def likelihoods(
    answers: Sequence[Answer],
    batch_size: int,
    predict: Callable[[list[Answer]], Iterable[torch.Tensor]],
    size: Callable[[Answer], int],
) -> list[tuple[float, bool]]:
    """Return each answer's log-likelihood in nats, and whether greedy decoding would give it.

    Answers that differ only in their last token, such as one-token choices, share a forward pass.

    Args:
        answers: prompts, which are hashable, with answers.
        batch_size: number of forward passes to make at once.
        predict: function of a batch of answers. For each of n tokens, it returns the logits that predict them,
            (n, vocabulary).
        size: function of an answer: those of similar size, the largest first, are in one batch.
    """
    passes: dict[Hashable, list[int]] = defaultdict(list)
    for index, (prompt, ids) in enumerate(answers):
        passes[prompt, tuple(ids[:-1])].append(index)
    waiting = sorted(passes.values(), key=lambda sharing: size(answers[sharing[0]]), reverse=True)
    scored: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(waiting), batch_size):
        batch = waiting[start : start + batch_size]
        logits = predict([answers[sharing[0]] for sharing in batch])
        for sharing, row in zip(batch, logits, strict=True):
            window = functional.log_softmax(row, -1, dtype=torch.float32)
            for index in sharing:
                target = torch.tensor(answers[index][1], device=window.device)
                likelihood = window.gather(-1, target[:, None]).sum().item()
                scored[index] = (likelihood, bool((window.argmax(-1) == target).all()))
    return [scored[index] for index in range(len(answers))]


def logits_before(
    model: Any, inputs: Mapping[str, torch.Tensor], ends: Sequence[int], sizes: Sequence[int]
) -> list[torch.Tensor]:
    """Return the logits at the last ``size`` positions before ``end`` of each row: (size, vocabulary)."""
    starts = [end - size for end, size in zip(ends, sizes, strict=True)]
    first = min(starts)
    with torch.inference_mode():
        logits = logits_at(model, inputs, torch.arange(first, max(ends)))
    return [row[start - first : end - first] for row, start, end in zip(logits, starts, ends, strict=True)]
