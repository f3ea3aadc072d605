"""Output features of Linears that nothing in the model reads."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from emloc_core.conformance.forward import answer, logits
from emloc_core.model.hooks import forward_hooks
from emloc_core.objective import Sample

_INSTEAD = (float("nan"), 1e3, -1e3)


def unread_features(model: nn.Module, samples: Sequence[Sample], linears: Iterable[str]) -> dict[str, torch.Tensor]:
    """Find output features that no logit depends on.

    Args:
        model: in eval mode.

    Returns:
        A mask of such features, (out_features,), bool, by path of each Linear that has some.
    """
    linears = list(linears)
    if not linears:
        return {}
    silent = {path: ~reached for path, reached in _reached(model, samples, linears).items() if not reached.all()}
    before = [logits(model, sample) for sample in samples] if silent else []

    def matters(path: str, value: float) -> bool:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return output.masked_fill(silent[path], value)

        with forward_hooks([(model.get_submodule(path), hook)]):
            return not all(torch.equal(logits(model, sample), old) for sample, old in zip(samples, before, strict=True))

    # A gradient says nothing about a ReLU's negative side, or about scores that only select; other values do.
    return {path: features for path, features in silent.items() if not any(matters(path, value) for value in _INSTEAD)}


def _reached(model: nn.Module, samples: Sequence[Sample], linears: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return which output features a gradient of the logits reaches at any token: (out_features,), bool."""
    model = copy.deepcopy(model)  # some keep a state, which would hold on to the graph
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in linears}
    reached = {path: torch.zeros(module.out_features, dtype=torch.bool) for path, module in modules.items()}
    probes: list[tuple[str, torch.Tensor]] = []

    def probing(path: str) -> Callable[..., torch.Tensor]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            probes.append((path, probe))
            return output + probe

        return hook

    with torch.enable_grad(), forward_hooks((module, probing(path)) for path, module in modules.items()):
        for sample in samples:
            probes.clear()
            outcome = answer(model, sample).square().sum()
            gradients = torch.autograd.grad(outcome, [probe for _, probe in probes], allow_unused=True)
            for (path, _), gradient in zip(probes, gradients, strict=True):
                if gradient is not None:
                    reached[path] |= gradient.flatten(0, -2).bool().any(0)
    return reached
