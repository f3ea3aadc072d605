"""The loss of a base with a LoRA on held-out rows, streamed block by block."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.lora import Lora
from emloc_core.model.hooks import forward_hooks, forwards
from emloc_core.model.skeleton import Skeleton
from emloc_core.model.streaming import Stream
from emloc_core.objective import Sample
from emloc_core.standins.experts import is_stack, routed


def with_lora(output: torch.Tensor, inputs: torch.Tensor, lora: Lora) -> torch.Tensor:
    """Return a Linear's output, (..., m), with what a LoRA adds for its inputs, (..., n)."""
    change = (inputs.to(lora.a.dtype) @ lora.a.T) @ lora.b.T
    return (output + lora.scale * change).to(output.dtype)


@contextmanager
def adding(
    model: nn.Module, loras: Mapping[str, Any], choose: Callable[[Any], Lora] = lambda lora: lora
) -> Iterator[None]:
    """Add LoRAs to the outputs of a model's Linears and experts while the context is active.

    Args:
        loras: by the path of a module, or of a stack of experts.
        choose: returns the LoRA to apply for one of these; called in every forward.
    """
    stacks: dict[str, dict[str, Any]] = defaultdict(dict)
    linears = {}
    for path, lora in loras.items():
        owner, _, name = path.rpartition(".")
        if is_stack(model, path):
            stacks[owner][name] = lora
        else:
            linears[path] = lora

    def added(lora: Any) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
        return lambda _module, args, output: with_lora(output, args[0], choose(lora))

    def experts(module: nn.Module, by_name: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: routed(
            module, *args, **kwargs, loras={name: choose(lora) for name, lora in by_name.items()}
        )

    replacements = [(module := model.get_submodule(path), experts(module, by_name)) for path, by_name in stacks.items()]
    hooks = ((model.get_submodule(path), added(lora)) for path, lora in linears.items())
    with forwards(replacements), forward_hooks(hooks):
        yield


def summed_loss(skeleton: Skeleton, samples: Sequence[Sample], loras: Mapping[str, Lora]) -> torch.Tensor:
    """Return the loss of a base with a LoRA, summed, and the number of tokens, (2,), fp64, in one streamed pass."""
    stream = Stream(skeleton)

    @contextmanager
    def adapted(unit: str) -> Iterator[None]:
        paths = [path for path in loras if path == unit or path.startswith(f"{unit}.")]
        with adding(skeleton.model, {path: loras[path].to(skeleton.device) for path in paths}):
            yield

    forwards = [partial(sample.loss, skeleton.model, skeleton.device) for sample in samples]
    results = stream.run(forwards, adapted)
    return torch.stack(results).sum(0) if results else torch.zeros(2, dtype=torch.float64)
