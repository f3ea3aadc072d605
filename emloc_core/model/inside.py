"""The numbers that a row holds inside a block, by formula, from shapes alone (``docs/memory.md``)."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from emloc_core.family import Family, Tower
from emloc_core.model.blocks import block_paths
from emloc_core.standins.experts import experts_per_token, width


class Positions(NamedTuple):
    """How many positions of rows pass through a module: tokens, or patches of images.

    Attributes:
        all: of all rows.
        at_once: of the largest micro-batch, or of the longest row where rows pass one by one.
    """

    all: int
    at_once: int


class Inside(NamedTuple):
    """How many numbers there are inside a block for every position.

    Attributes:
        forward: while rows pass through: the hidden states, and what an activation function reads, multiplies and
            returns, each as wide as the widest Linear's inputs and outputs.
        backward: while they are gone back through: inputs and outputs of all Linears and experts; each tensor, and its
            gradient or what a norm or an activation function makes of it.
    """

    forward: int
    backward: int


def inside(model: nn.Module, family: Family) -> dict[str, Inside]:
    """Return the numbers that a row holds inside every block, by path; the model may be on the meta device."""
    active = experts_per_token(model.config)
    sizes = {}
    for path in block_paths(model, family):
        tower = next(tower for tower in family.towers if path.startswith(f"{tower.blocks}."))
        widths = list(_widths(model.get_submodule(path), tower, active))
        sizes[path] = Inside(3 * max(widths, default=0), 2 * sum(widths))
    return sizes


def linears_in(block: nn.Module) -> list[nn.Linear]:
    """Return a block's Linears."""
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


def hidden_size(blocks: nn.Module) -> int:
    """Return the size of a tower's hidden states, which its first Linear reads; 0 without any."""
    return next((linear.in_features for linear in linears_in(blocks)), 0)


def _widths(block: nn.Module, tower: Tower, active: int) -> Iterator[int]:
    """Yield how many numbers of a position go into and out of each Linear, and of the experts that it goes to."""
    for linear in linears_in(block):
        yield linear.in_features + linear.out_features
    for path, module in block.named_modules():
        if path in tower.experts:
            yield active * width(module)
