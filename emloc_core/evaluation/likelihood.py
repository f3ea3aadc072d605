"""Likelihoods of answers, from the logits of their own positions: those of whole rows would take gigabytes.

lm-eval computes all logits of a batch and their logarithms in fp32: of 8 rows of 1,000 tokens and a vocabulary of
150,000, 7 GB, which is more than a large model leaves free on the GPU that it was tuned on.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional


def likelihoods(
    answers: Sequence[tuple[Hashable, Sequence[int]]],
    batch_size: int,
    predict: Callable[[list[int]], Iterable[torch.Tensor]],
) -> list[tuple[float, bool]]:
    """Return each answer's log-likelihood in nats, and whether greedy decoding would give it.

    Answers that differ only in their last token, such as one-token choices, share a forward pass.

    Args:
        answers: what tells an answer's prompt from others, and the answer's token ids.
        batch_size: number of forward passes to make at once.
        predict: function of the indices of answers, in one batch. For each answer of n tokens, it returns the logits
            that predict them, (n, vocabulary).
    """
    passes: dict[Any, list[int]] = defaultdict(list)
    for index, (prompt, ids) in enumerate(answers):
        passes[prompt, tuple(ids[:-1])].append(index)
    waiting = list(passes.values())
    scored: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(waiting), batch_size):
        batch = waiting[start : start + batch_size]
        logits = predict([sharing[0] for sharing in batch])
        for sharing, row in zip(batch, logits, strict=True):
            window = functional.log_softmax(row, -1, dtype=torch.float32)
            for index in sharing:
                target = torch.tensor(answers[index][1], device=window.device)
                likelihood = window.gather(-1, target[:, None]).sum().item()
                scored[index] = (likelihood, bool((window.argmax(-1) == target).all()))
    return [scored[index] for index in range(len(answers))]


def last_logits(model: Any, inputs: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    """Return the logits of at least the last ``number`` positions, (B, at least number, vocabulary).

    Args:
        model: a transformers or PEFT model. If it cannot leave out logits, all are returned.
        inputs: its inputs.
    """
    of_base = model.get_base_model() if hasattr(model, "get_base_model") else model
    chooses = "logits_to_keep" in inspect.signature(of_base.forward).parameters
    ids = inputs["input_ids"]
    # Positions, not their number: a slice of the hidden states, times a frozen weight, copies it for each row on a CPU.
    positions = torch.arange(ids.shape[1] - number, ids.shape[1], device=ids.device)
    options = {"logits_to_keep": positions} if chooses else {}
    with torch.inference_mode():
        return model(**inputs, **options, use_cache=False).logits
