"""The loss of a base with a LoRA on held-out rows, streamed block by block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.lora import Lora
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.skeleton import Skeleton
from emloc_core.model.streaming import Stream
from emloc_core.objective import Sample


def with_lora(output: torch.Tensor, inputs: torch.Tensor, lora: Lora) -> torch.Tensor:
    """Return a Linear's output, (..., m), with what a LoRA adds for its inputs, (..., n)."""
    change = (inputs.to(lora.a.dtype) @ lora.a.T) @ lora.b.T
    return (output + lora.scale * change).to(output.dtype)


def summed_loss(skeleton: Skeleton, samples: Sequence[Sample], loras: Mapping[str, Lora]) -> torch.Tensor:
    """Return the loss of a base with a LoRA, summed, and the number of tokens, (2,), fp64, in one streamed pass.

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

    forwards = [partial(sample.loss, skeleton.model, skeleton.device) for sample in samples]
    results = stream.run(forwards, adapted)
    return torch.stack(results).sum(0) if results else torch.zeros(2, dtype=torch.float64)
