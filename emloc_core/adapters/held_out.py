"""The loss of a base with a LoRA on held-out rows, streamed block by block."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.lora import Lora
from emloc_core.data.tokenize import Sample
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.skeleton import Skeleton
from emloc_core.model.streaming import Stream


def summed_loss(skeleton: Skeleton, sample: Sample) -> Callable[[], torch.Tensor]:
    """Return a forward of one sample: its loss, summed over the tokens that count, and their number, (2,), fp64.

    Only their logits are computed, where the model can leave out the others.
    """
    chooses = "logits_to_keep" in inspect.signature(skeleton.model.forward).parameters

    def forward() -> torch.Tensor:
        inputs = sample.inputs(skeleton.device)
        before = torch.tensor(sample.completion_mask[1:], device=skeleton.device).nonzero()[:, 0]  # predict the next
        chosen = {"logits_to_keep": before} if chooses else {}
        logits = skeleton.model(**inputs, **chosen, use_cache=False).logits[0]
        targets = inputs["input_ids"][0, before + 1]
        loss = nn.functional.cross_entropy((logits if chooses else logits[before]).float(), targets, reduction="sum")
        return torch.tensor([float(loss), len(before)], dtype=torch.float64)

    return forward


def with_lora(output: torch.Tensor, inputs: torch.Tensor, lora: Lora) -> torch.Tensor:
    """Return a Linear's output, (..., m), with what a LoRA adds for its inputs, (..., n)."""
    change = (inputs.to(lora.a.dtype) @ lora.a.T) @ lora.b.T
    return (output + lora.scale * change).to(output.dtype)


def mean_loss(skeleton: Skeleton, samples: Sequence[Sample], loras: Mapping[str, Lora]) -> float:
    """Return the mean loss per token of a base with a LoRA, in one streamed pass.

    Args:
        skeleton: of the base.
        samples: the held-out rows.
        loras: by module path of the base.
    """
    stream = Stream(skeleton)

    @contextmanager
    def adapted(unit: str) -> Iterator[None]:
        paths = [path for path in loras if path == unit or path.startswith(f"{unit}.")]
        with forward_hooks([(skeleton.model.get_submodule(path), added(path)) for path in paths]):
            yield

    def added(path: str) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
        lora = loras[path].to(skeleton.device)
        return lambda _module, args, output: with_lora(output, args[0], lora)

    results = torch.stack(stream.run([summed_loss(skeleton, sample) for sample in samples], adapted))
    loss, tokens = results.sum(0).tolist()
    return float(loss / tokens)
