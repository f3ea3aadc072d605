"""Arithmetic of a forward pass: operations of products with matrices, from shapes alone.

Attention's own products and what is done number by number come on top, so this is a lower bound.
"""

from collections.abc import Iterator

from torch import nn

from emloc_core.emulator.ranks import RankPlan
from emloc_core.memory.model import MemoryModel
from emloc_core.standins.experts import experts_per_token

#: Operations per number of a matrix and position: a multiplication and an addition.
_PRODUCT = 2


def forward(model: MemoryModel, plan: RankPlan | None = None) -> int:
    """Return the operations of one row's forward pass through the base, or through a plan's emulator."""
    return _PRODUCT * sum(numbers * model.step.positions(path) for path, numbers in _matrices(model, plan))


def _matrices(model: MemoryModel, plan: RankPlan | None) -> Iterator[tuple[str, int]]:
    """Yield the path of every matrix or stack of them, and how many numbers multiply a position."""
    planned = plan or model.linears
    by_path = {linear.path: linear for linear in planned.linears}
    for path, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            linear = by_path.get(path)
            replaced = plan and linear and linear.is_replaced
            yield path, linear.stored(model.format) if replaced and linear else module.weight.numel()
    active = experts_per_token(model.config)
    for stack in planned.experts:
        replaced = plan and stack.is_replaced
        yield stack.path, active * (stack.stored(model.format) if replaced else stack.numbers) // stack.experts
