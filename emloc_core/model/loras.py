"""LoRAs added to what the modules of a model compute, without changing the model."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.lora import Lora
from emloc_core.model.hooks import forward_hooks, forwards
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
