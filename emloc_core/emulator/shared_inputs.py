"""Refuses input groups whose Linears receive different tensors, on the first rows that pass through a block.

The statistics of a group are those of one of its Linears. Where a model's config takes another branch than those that
its family was tested on, the others would be fitted to inputs that they never see, and no number would tell.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from emloc_core.emulator.ranks import LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.streaming import Stream

#: Rows that are looked at: one more pass of so many through each block.
ROWS = 2

#: Path of a Linear -> its input at each call, (..., in_features).
Inputs = dict[str, list[torch.Tensor]]


def require_shared_inputs(stream: Stream, block: str, planned: Sequence[LinearPlan], family: Family) -> None:
    """Run a block on the first samples that wait at it, and compare what the Linears of each group are given.

    Args:
        stream: samples wait at the block, whose weights are loaded.
        block: its path.
        planned: its compressed Linears.
        family: the declaration, for the message.

    Raises:
        EmlocError: two Linears of a group receive different tensors.
    """
    groups = [group for group in _groups(planned) if len(group) > 1]
    for sample in stream.here[:ROWS] if groups else ():
        seen = _inputs(stream, block, [linear for group in groups for linear in group], sample)
        for group in groups:
            first, *others = [linear.path for linear in group if linear.path in seen] or [""]
            for path in others:
                if not alike(seen[first], seen[path]):
                    raise EmlocError(
                        f"The family {family.name!r} declares that {first} and {path} read the same input, and in this "
                        "model they do not: the factors of one would be fitted to the input of the other.",
                        f"Put {path.removeprefix(f'{block}.')} into an input group of its own in the plugin, and add a "
                        "tiny config of such a model (docs/plugins.md).",
                        code="plugin",
                    )


def alike(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Return whether two Linears were given equal tensors at every call."""
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _groups(planned: Sequence[LinearPlan]) -> list[list[LinearPlan]]:
    groups: dict[tuple[str, ...], list[LinearPlan]] = defaultdict(list)
    for linear in planned:
        groups[linear.group].append(linear)
    return list(groups.values())


def _inputs(stream: Stream, block: str, linears: Sequence[LinearPlan], sample: int) -> Inputs:
    """Run a block on a waiting sample, and return what Linears are given; those that do not run are left out."""
    seen: Inputs = defaultdict(list)

    def watching(linear: LinearPlan) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            given = args[0] if isinstance(linear.tap, str) else linear.tap(module, args, output)
            seen[linear.path].append(given.clone())  # what follows may write into it

        return hook

    model = stream.skeleton.model
    hooks = [(model.get_submodule(linear.path), watching(linear)) for linear in linears]
    with forward_hooks(hooks), stream.arguments(sample) as (args, kwargs):
        model.get_submodule(block)(*args, **kwargs)
    return seen
