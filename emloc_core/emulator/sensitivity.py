"""How much a Linear's error disturbs its block: measured, by letting it alone answer by its factors.

Output errors of different Linears cannot be compared: that of a v_proj reaches the hidden states almost whole, that of
a q_proj hides behind a softmax, and that of an o_proj is small beside what it is added to. What counts is the hidden
state behind the block. Next comes a norm that scales every token to the same length, so the change is taken relative
to the token's own length: else the few tokens with massive activations would decide alone.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from emloc_core.algorithms.allocation import uniform
from emloc_core.algorithms.factorize import Factors

#: Calibration rows that are sent through a block once more for every Linear.
PROBES = 8
#: The ratio at which a Linear is tried, and the least relative output error that says something.
_RATIO, _LEAST = 0.5, 1e-3

#: What a block was called with.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: Lets the Linear at a path answer by U and V instead of its weight, for the time of the context.
Answering = Callable[[str, tuple[torch.Tensor, torch.Tensor]], AbstractContextManager[None]]


def sensitivities(
    block: nn.Module, calls: Sequence[Arguments], factors: Mapping[str, Factors], answering: Answering
) -> dict[str, float]:
    """Return the disturbance of the block's output for every unit of a Linear's own squared relative error, by path.

    The disturbance is ``mean |change|^2 / |output|^2`` over the tokens, with one Linear at a time at half of its
    parameters. Both are squares of what is small, so their quotient holds for other ranks too.

    Args:
        block: with the base's weights.
        calls: what it was called with; see :func:`copied`.
        factors: by module path, at least at half of the Linear's parameters.
        answering: see :data:`Answering`.
    """
    references = [_hidden(block(*args, **kwargs)) for args, kwargs in calls]
    found = {}
    for path, whole in factors.items():
        tried = _at_a_telling_rank(whole)
        changes = []
        with answering(path, (tried.u, tried.v)):
            for (args, kwargs), reference in zip(calls, references, strict=True):
                change = (_hidden(block(*args, **kwargs)) - reference).square().sum(-1)
                changes.append(
                    (change / reference.square().sum(-1).clamp(min=torch.finfo(change.dtype).tiny)).flatten()
                )
        error = tried.relative_error()
        found[path] = float(torch.cat(changes).mean()) / error**2 if error >= _LEAST else 0.0
    return found


def _at_a_telling_rank(factors: Factors) -> Factors:
    (m, largest), n = factors.u.shape, factors.v.shape[1]
    rank = min(largest, uniform([(m, n)], _RATIO)[0])
    while rank > 1 and factors.relative_error(rank) < _LEAST:  # there were fewer tokens than ranks, say
        rank //= 2
    return replace(factors, u=factors.u[:, :rank], v=factors.v[:rank])


def _hidden(output: Any) -> torch.Tensor:
    """Return what a block gives to the next one, (..., features), in fp32."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden.float()


def copied(arguments: Arguments) -> Arguments:
    """Copy what a block is called with: the model may change or free its own."""
    return tree_map(lambda each: each.clone() if isinstance(each, torch.Tensor) else each, arguments)
