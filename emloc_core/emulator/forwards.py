"""Refuses models that compute something other than what is declared, on any row that passes through a block.

The statistics of an input group are those of one of its Linears. Where a model's config takes another branch than those
that its family was tested on, or a long row another than a short one, the others would be fitted to inputs that they
never see, and no number would tell. And what stands in for a Linear computes ``W x + b`` alone: a family's tiny models
need not have the Linears of other classes that some blocks of a large model have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from emloc_core.compat.torch import writes
from emloc_core.emulator.ranks import LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.streaming import Stream
from emloc_core.standins.costs import groups

#: Largest relative difference between two ways to compute a product; in dtypes that round more, two roundings.
_ROUNDING = 1e-5


@contextmanager
def requiring_shared_inputs(stream: Stream, planned: Sequence[LinearPlan], family: Family) -> Iterator[None]:
    """Watch the samples pass through a block, and compare the inputs of the Linears of each group.

    Args:
        stream: samples wait at the block.

    Raises:
        EmlocError: at the end, if two Linears of a group received different tensors.
    """
    shared = [group for group in groups(planned) if len(group) > 1]
    seen: dict[tuple[int, tuple[str, ...]], _Shared] = {}
    members = {group[0].group: [linear.path for linear in group] for group in shared}
    differing: list[tuple[str, LinearPlan]] = []

    def watching(linear: LinearPlan) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], _output: Any) -> None:
            calls = seen.setdefault((stream.sample, linear.group), _Shared(members[linear.group]))
            if not calls.agrees(linear.path, args[0]):
                differing.append((calls.first, linear))

        return hook

    modules = stream.skeleton.model.get_submodule
    with forward_hooks((modules(linear.path), watching(linear)) for group in shared for linear in group):
        yield
    for linear in (linear for group in shared for linear in group):
        forwards = [calls for (_, group), calls in seen.items() if group == linear.group]
        differing += [(calls.first, linear) for calls in forwards if not calls.ran_as_often(linear.path)]
    for first, other in differing:
        raise EmlocError(
            f"The family {family.name!r} declares that {first} and {other.path} read the same input, and in this "
            "model they do not: the factors of one would be fitted to the input of the other.",
            f"Put {other.path.removeprefix(f'{other.block}.')} into an input group of its own in the plugin, and add a "
            "tiny config of such a model (docs/plugins.md).",
            code="plugin",
        )


class _Shared:
    """The inputs of a group's Linears in one forward.

    Attributes:
        first: path of the one that ran first.
    """

    first = ""

    def __init__(self, group: Sequence[str]) -> None:
        self._calls = dict.fromkeys(group, 0)
        self._inputs: dict[int, tuple[torch.Tensor, int]] = {}

    def agrees(self, path: str, inputs: torch.Tensor) -> bool:
        """Say whether a Linear has the inputs that the first one had at its call of this number.

        They are kept until the others have run, and not copied, which would take memory for every waiting sample: if
        they were written to since, they are other inputs.
        """
        self.first = self.first or path
        call = self._calls[path]
        self._calls[path] += 1
        if path == self.first:
            self._inputs[call] = (inputs, writes(inputs))
            return True
        before, version = self._inputs.get(call, (None, None))
        if before is None or writes(before) != version:
            return False
        if min(self._calls.values()) > call:
            del self._inputs[call]
        return before is inputs or torch.equal(before, inputs)

    def ran_as_often(self, path: str) -> bool:
        """Say whether a Linear ran as often as the first one, or not at all."""
        return self._calls[path] in (0, self._calls[self.first])


def alike(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    """Return whether two Linears were given equal tensors at every call."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


@contextmanager
def requiring_products(stream: Stream, planned: Sequence[LinearPlan], rows: int) -> Iterator[None]:
    """Watch samples pass through a block, and compare what Linears of other classes return with ``W x + b``.

    Args:
        stream: samples ``0 .. rows - 1`` pass through the base.

    Raises:
        EmlocError: at the end, if one returned something else.
    """
    modules = {linear.path: stream.skeleton.model.get_submodule(linear.path) for linear in planned}
    others = {path: module for path, module in modules.items() if type(module).forward is not nn.Linear.forward}
    odd: list[str] = []

    def watching(path: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if stream.sample < rows and not _is_product(module, args, output):
                odd.append(path)

        return hook

    with forward_hooks(((module, watching(path)) for path, module in others.items()), first=True):
        yield
    if odd:
        raise EmlocError(
            f"{odd[0]} is a {type(modules[odd[0]]).__name__}, which computes something else than W x + b.",
            "List it in keep_dense of the family's declaration.",
            code="plugin",
        )


def _is_product(module: Any, args: tuple[Any, ...], output: Any) -> bool:
    expected = functional.linear(args[0], module.weight, module.bias)
    if not isinstance(output, torch.Tensor) or output.shape != expected.shape:
        return False
    room = max(_ROUNDING, 2 * torch.finfo(expected.dtype).eps)
    return float((output - expected).double().norm()) <= room * float(expected.double().norm())
