"""Arithmetic of a forward pass and of stage 1: operations of products with matrices, from shapes alone.

Attention's own products and what is done number by number come on top, so these are lower bounds.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from emloc_core.emulator.ranks import LinearPlan, RankPlan
from emloc_core.emulator.sensitivity import PROBES, RATIO
from emloc_core.memory.model import MemoryModel
from emloc_core.model.blocks import block_paths
from emloc_core.standins import Format
from emloc_core.standins.costs import groups
from emloc_core.standins.experts import experts_per_token

#: Operations per number of a matrix and position: a multiplication and an addition.
_PRODUCT = 2


class Operations(NamedTuple):
    """Operations of a stage.

    Attributes:
        own: in the model's own dtype.
        single: in single precision.
    """

    own: int
    single: float


def forward(model: MemoryModel, plan: RankPlan | None = None) -> int:
    """Return the operations of one row's forward pass, in its batch, through the base, or through a plan's emulator."""
    products = sum(numbers * positions(model, path) for path, numbers in _matrices(model, plan))
    rows = model.workload.batch_size
    for linear in plan.linears if plan else ():
        if linear.is_replaced:
            products -= model.format.spared(linear.shape, linear.rank, rows * positions(model, linear.path)) // rows
    return _PRODUCT * products


def compress(model: MemoryModel, plan: RankPlan) -> Operations:
    """Return the operations of stage 1, for calibration rows of the workload's length; none without calibration.

    - The rows pass through the blocks of the base and, where errors are propagated, of the emulator.
    - Statistics are Grams: ``2 T s^2`` for T tokens and side s. Every Linear is then decomposed, or rounded.
    - Where errors are propagated, what arrives at every input group is fitted.
    - Refinement passes through the block, forward and backward.
    - Where spectra decide on ranks, there is a pass before, in which some rows pass through a block once per Linear.
    """
    settings = model.method.settings
    own, single = 0, 0.0
    if settings.calibration == "none":
        return Operations(own, single)
    propagated = settings.calibration == "propagated"
    for block in block_paths(model.model, model.family):
        per_row, linears = positions(model, block), plan.in_block(block)
        all_rows = settings.samples * per_row
        base, emulator = (sum(numbers for _, numbers in _matrices(model, each, block)) for each in (None, plan))
        if model.method.by_spectra:
            probed = min(PROBES, settings.samples) * per_row
            own += _PRODUCT * base * (all_rows + probed * (1 + len(linears)))
            own -= int(_PRODUCT * probed * (1 - RATIO) * sum(linear.numbers for linear in linears))  # each once, cut
            single += _fitted(linears, all_rows, model.format.ranking())
        if propagated:
            own += _PRODUCT * all_rows * (base + emulator)
            single += _propagated(linears, all_rows, model.format)
        else:
            own += _PRODUCT * all_rows * base
            single += _fitted(linears, all_rows, model.format)
        if settings.refine:
            own += _PRODUCT * all_rows * (emulator + _refinement(linears, settings.refine))
    return Operations(own, single)


def _matrices(model: MemoryModel, plan: RankPlan | None, root: str = "") -> Iterator[tuple[str, int]]:
    """Yield the path of every matrix or stack of them below a module, and how many numbers multiply a position."""
    planned = plan or model.linears
    known = {linear.path: linear for linear in planned.linears}
    for path, module in model.model.get_submodule(root).named_modules(prefix=root):
        if isinstance(module, nn.Linear):
            linear = known.get(path)
            replaced = plan and linear and linear.is_replaced
            yield path, linear.stored(model.format) if replaced and linear else module.weight.numel()
    chosen = experts_per_token(model.config)
    for stack in planned.experts:
        if root in ("", stack.block):
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


def _fitted(linears: Sequence[LinearPlan], positions: int, format: Format) -> float:
    """Return what the statistics of a block's own activations take, and the stand-ins that are made of them."""
    sides = sum(linear.out_features**2 for linear in linears if linear.tap == "output")
    inputs = {linear.group: linear.in_features for linear in linears if linear.tap != "output"}
    sides += sum(side**2 for side in inputs.values())
    return _PRODUCT * positions * sides + sum(format.fitting_operations(group) for group in groups(linears))


def _propagated(linears: Sequence[LinearPlan], positions: int, format: Format) -> float:
    """Return what it takes to fit a block's stand-ins, as in :mod:`emloc_core.emulator.propagation`."""
    total = 0.0
    for group in groups(linears):
        n, m = group[0].in_features, sum(linear.out_features for linear in group)
        targets = n * n if m >= n else 2 * n * m
        total += _PRODUCT * positions * (n * n + targets) + n**3 / 3 + _PRODUCT * m * n * n
        total += format.fitting_operations(group)
    return total


def _refinement(linears: Sequence[LinearPlan], epochs: int) -> int:
    """Return how many numbers a position is multiplied by: three times in each step, to compare, and to measure errors.

    What the first group reads needs no gradient.
    """
    numbers = [sum(linear.numbers for linear in group) for group in groups(linears)]
    return (2 + 3 * epochs) * sum(numbers) - epochs * sum(numbers[:1])
