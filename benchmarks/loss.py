"""The loss that the benchmarks of emulators compare."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from emloc_core.data.tokenize import Sample


@torch.no_grad()
def nll(model: nn.Module, samples: Sequence[Sample]) -> float:
    """Return the mean loss per token of the completions."""
    loss, tokens = 0.0, 0
    for sample in samples:
        inputs = sample.inputs("cpu")
        counted = torch.tensor(sample.completion_mask[1:], dtype=torch.bool)
        logits = model(**inputs, use_cache=False).logits[0, :-1][counted]
        loss += float(functional.cross_entropy(logits.float(), inputs["input_ids"][0, 1:][counted], reduction="sum"))
        tokens += int(counted.sum())
    return loss / tokens
