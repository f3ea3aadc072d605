"""The sensitivity of a block to a Linear's error, measured by replacing only that Linear with its factors.

Output errors of different Linears are not comparable: that of a v_proj reaches the hidden states almost undamped, that
of a q_proj is attenuated by a softmax, and that of an o_proj is small relative to the residual stream. What counts is
the hidden state after the block. The norm that follows scales every token to the same length, so the change is taken
relative to the token's own length: otherwise the few tokens with massive activations would dominate.
"""

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.allocation import uniform
from emloc_core.algorithms.factorize import Factors
from emloc_core.compat.torch import tree_map
from emloc_core.standins import StandIn

#: Calibration rows that are passed through a block again for every Linear.
PROBES = 8
#: The ratio at which a Linear is measured.
RATIO = 0.5
_LEAST = 1e-3  # the smallest relative output error that is meaningful

#: The arguments of a call of a block.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: Lets the Linear at a path compute with a stand-in while the context is active.
Answering = Callable[[str, StandIn], AbstractContextManager[None]]


def sensitivities(
    block: nn.Module, calls: Sequence[Arguments], factors: Mapping[str, Factors], answering: Answering
) -> dict[str, float]:
    """Return the disturbance of the block's output per unit of a Linear's own squared relative error, by path.

    The disturbance is ``mean |change|^2 / |output|^2`` over the tokens, with one Linear at a time at half of its
    parameters. Both are quadratic in small errors, so their ratio holds for other ranks too.

    Args:
        block: the block, with the base's weights.
        calls: arguments that it was called with; see :func:`copied`.
        factors: factors by module path, with at least half of the Linear's parameters.
    """
    references = [hidden_states(block(*args, **kwargs)).float() for args, kwargs in calls]
    by_path = {}
    for path, linear_factors in factors.items():
        rank = _telling_rank(linear_factors)
        changes = []
        with answering(path, StandIn(linear_factors.u[:, :rank], linear_factors.v[:rank])):
            for (args, kwargs), reference in zip(calls, references, strict=True):
                changes.append(relative_change(hidden_states(block(*args, **kwargs)), reference).flatten())
        error = linear_factors.relative_error(rank)
        by_path[path] = float(torch.cat(changes).mean()) / error**2 if error >= _LEAST else 0.0
    return by_path


def _telling_rank(factors: Factors) -> int:
    (m, largest), n = factors.u.shape, factors.v.shape[1]
    rank = min(largest, uniform([(m, n)], RATIO)[0])
    while rank > 1 and factors.relative_error(rank) < _LEAST:  # there were fewer tokens than ranks, say
        rank //= 2
    return rank


def relative_change(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return how far every token is from its target, squared, relative to the target's own length, in fp32."""
    change = (output.float() - target.float()).square().sum(-1)
    return change / target.float().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)


def hidden_states(output: Any) -> torch.Tensor:
    """Return the hidden states that a block passes on, (..., features): those of all its streams, one after the other.

    Streams have equally many features; any other tensor, such as the weights of attention, is none.
    """
    outputs = output if isinstance(output, tuple | list) else [output]
    tensors = [tensor for tensor in outputs if isinstance(tensor, torch.Tensor)]
    first = tensors[0]
    streams = [tensor for tensor in tensors if tensor.ndim == first.ndim and tensor.shape[-1] == first.shape[-1]]
    return first if len(streams) == 1 else torch.cat([tensor.reshape(-1, first.shape[-1]) for tensor in streams])


def copied(arguments: Arguments) -> Arguments:
    """Copy the arguments of a call of a block: the model may modify or free the originals."""
    return tree_map(_copied, arguments)


def _copied(value: Any) -> Any:
    if isinstance(value, UserDict):  # in which transformers hands keys and values on to later blocks
        return type(value)(tree_map(_copied, value.data))
    return value.clone() if isinstance(value, torch.Tensor) else value
