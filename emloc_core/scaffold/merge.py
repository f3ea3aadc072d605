"""Merges the blocks of a stack, of every kind and in every observed branch, into one declaration."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Stack:
    """One list of blocks, as observed.

    Attributes:
        groups: paths of Linears within a block; those of one group read the same input. In order of execution.
        dense: paths within a block of what cannot be compressed, each with the reason.
        experts: paths within a block of fused experts of a known layout.
    """

    path: str
    groups: list[list[str]] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """What was observed of one block.

    Attributes:
        order: paths of its Linears, in order of execution.
        alike: pairs of these that read the same input.
        dense: paths within it of what cannot be compressed, each with the reason.
        experts: paths within it of fused experts of a known layout.
    """

    order: Sequence[str]
    alike: frozenset[frozenset[str]]
    dense: Mapping[str, str]
    experts: Sequence[str] = ()


def merged(path: str, blocks: Sequence[Block]) -> Stack:
    """Return what holds in all blocks: Linears share a group if they read one input wherever both of them run.

    Args:
        blocks: observed blocks of one model, or of several.
    """
    stack = Stack(path)
    for block in blocks:
        stack.dense |= block.dense
    experts = dict.fromkeys(name for block in blocks for name in block.experts)
    stack.experts = [name for name in experts if not is_within(name, stack.dense)]
    orders = [[name for name in block.order if not is_within(name, stack.dense)] for block in blocks]
    for name in dict.fromkeys(name for order in orders for name in order):
        group = next(
            (candidate for candidate in stack.groups if all(_share(name, other, blocks) for other in candidate)), None
        )
        if group is None:
            stack.groups.append([name])
        else:
            group.append(name)
    stack.groups = _in_order(stack.groups, orders)
    return stack


def is_within(name: str, paths: Iterable[str]) -> bool:
    """Return whether a path is one of these, or below one."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _share(name: str, other: str, blocks: Sequence[Block]) -> bool:
    """Say whether two Linears run together in some block, and read the same input in every such block."""
    together = [block for block in blocks if name in block.order and other in block.order]
    return bool(together) and all(frozenset((name, other)) in block.alike for block in together)


def _in_order(groups: list[list[str]], orders: Sequence[Sequence[str]]) -> list[list[str]]:
    """Sort groups by their order of execution in every block; as first seen if the blocks leave it open.

    A hybrid's attention and its convolution never run in one block, and both run before the feed-forward Linears.
    """
    number = {name: index for index, group in enumerate(groups) for name in group}
    before: dict[int, set[int]] = {index: set() for index in range(len(groups))}
    for order in orders:
        ran = list(dict.fromkeys(number[name] for name in order))
        for position, index in enumerate(ran):
            before[index] |= set(ran[:position])
    sorted_groups: list[int] = []
    while len(sorted_groups) < len(groups):
        remaining = [index for index in before if index not in sorted_groups]
        # If blocks contradict each other, no group can be next: the conformance kit then says so.
        sorted_groups.append(next((index for index in remaining if before[index] <= set(sorted_groups)), remaining[0]))
    return [groups[index] for index in sorted_groups]
