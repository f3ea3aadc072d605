"""Refuses input groups whose Linears receive different tensors, on the first rows that pass through a block.

The statistics of a group are those of one of its Linears. Where a model's config takes another branch than those that
its family was tested on, the others would be fitted to inputs that they never see, and no number would tell.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from emloc_core.emulator.ranks import LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.streaming import Stream

#: Rows that are looked at.
ROWS = 2


@contextmanager
def requiring_shared_inputs(stream: Stream, planned: Sequence[LinearPlan], family: Family) -> Iterator[None]:
    """Watch the first samples pass through a block, and compare what the Linears of each group were given.

    Args:
        stream: samples wait at the block.
        planned: the block's compressed Linears.
        family: the declaration, for the message.

    Raises:
        EmlocError: at the end, if two Linears of a group received different tensors.
    """
    groups = [group for group in _groups(planned) if len(group) > 1]
    seen: dict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)
    watched = stream.here[:ROWS]

    def watching(linear: LinearPlan) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if stream.sample in watched:
                given = args[0] if isinstance(linear.tap, str) else linear.tap(module, args, output)
                seen[stream.sample, linear.path].append(given.clone())  # what follows may write into it

        return hook

    modules = stream.skeleton.model.get_submodule
    with forward_hooks((modules(linear.path), watching(linear)) for group in groups for linear in group):
        yield
    for sample in watched:
        for group in groups:
            first, *others = [linear for linear in group if (sample, linear.path) in seen] or group[:1]
            for other in others:
                if not alike(seen[sample, first.path], seen[sample, other.path]):
                    raise EmlocError(
                        f"The family {family.name!r} declares that {first.path} and {other.path} read the same input, "
                        "and in this model they do not: the factors of one would be fitted to the input of the other.",
                        f"Put {other.path.removeprefix(f'{other.block}.')} into an input group of its own in the "
                        "plugin, and add a tiny config of such a model (docs/plugins.md).",
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
