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
    """Return the operations of one row's forward pass, in its batch, through the base, or through a plan's emulator."""
    products = sum(numbers * positions(model, path) for path, numbers in _matrices(model, plan))
    rows = model.workload.batch_size
    for linear in plan.linears if plan else ():
        if linear.is_replaced:
            products -= model.format.spared(linear.shape, linear.rank, rows * positions(model, linear.path)) // rows
    return _PRODUCT * products


def _matrices(model: MemoryModel, plan: RankPlan | None) -> Iterator[tuple[str, int]]:
    """Yield the path of every matrix or stack of them, and how many numbers multiply a position."""
    planned = plan or model.linears
    known = {linear.path: linear for linear in planned.linears}
    for path, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            linear = known.get(path)
            replaced = plan and linear and linear.is_replaced
            yield path, linear.stored(model.format) if replaced and linear else module.weight.numel()
    chosen = experts_per_token(model.config)
    for stack in planned.experts:
        replaced = plan and stack.is_replaced
        yield stack.path, chosen * (stack.stored(model.format) if replaced else stack.numbers) // stack.experts


def positions(model: MemoryModel, path: str) -> int:
    """Return how many positions of a row pass through a module: tokens, patches, or the tokens that these become."""
    image, images = model.image, model.workload.images
    *others, language = (tower.blocks for tower in model.family.towers)
    if any(path.startswith(f"{blocks}.") for blocks in others):
        return images * image.patches if image else 0
    head = model.model.get_output_embeddings()
    outside = not path.startswith(f"{language}.") and model.model.get_submodule(path) is not head
    if outside and model.family.modality == "image-text":  # between the towers
        return images * image.tokens if image else 0
    return model.workload.length
