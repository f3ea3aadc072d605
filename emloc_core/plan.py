"""Which Linears are compressed, to which rank, and why."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.statistics import cheaper_side

#: (out_features, in_features) of a Linear.
Shape = tuple[int, int]


@dataclass(frozen=True)
class LinearPlan:
    """What happens to one Linear.

    Attributes:
        path: module path.
        block: path of the block that holds it.
        group: its input group: paths that read the same input.
        out_features, in_features: shape of the weight.
        rank: of the factors; None keeps the Linear dense.
        tap: how its activations are hooked: ``input``, ``output``, or the family's own function.
        reason: why it is dense.
    """

    path: str
    block: str
    group: tuple[str, ...]
    out_features: int
    in_features: int
    rank: int | None
    tap: Any
    reason: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {**asdict(self), "group": list(self.group), "tap": self.tap if isinstance(self.tap, str) else "function"}


@dataclass(frozen=True)
class Plan:
    """What happens to every Linear that the family names, in execution order."""

    linears: tuple[LinearPlan, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module path, for the Linears that are compressed."""
        return {linear.path: linear.rank for linear in self.linears if linear.rank is not None}

    def in_block(self, block: str) -> list[LinearPlan]:
        """Return the compressed Linears of one block."""
        return [linear for linear in self.linears if linear.block == block and linear.rank is not None]

    def parameters(self) -> tuple[int, int]:
        """Return how many parameters the named Linears have before and after."""
        before = sum(linear.out_features * linear.in_features for linear in self.linears)
        after = sum(
            linear.out_features * linear.in_features
            if linear.rank is None
            else linear.rank * (linear.out_features + linear.in_features)
            for linear in self.linears
        )
        return before, after


def uniform(shapes: Sequence[Shape], ratio: float) -> list[int]:
    """Return the ranks that keep the share ``ratio`` of every Linear's parameters (the paper's allocation).

    ``rank = floor(ratio * m * n / (m + n))``, at least 1.
    """
    return [max(1, int(ratio * m * n / (m + n))) for m, n in shapes]


def block_paths(model: nn.Module, family: Family) -> list[str]:
    """Return the module paths of all blocks of all towers, in execution order.

    Raises:
        EmlocError: the model has no such list of blocks.
    """
    found = []
    for tower in family.towers:
        try:
            blocks = model.get_submodule(tower.blocks)
        except AttributeError:
            raise EmlocError(
                f"The model has no {tower.blocks!r}, which the family {family.name!r} declares as its "
                f"{tower.name} tower.",
                "The declaration does not fit this model: update the plugin, or declare another family.",
            ) from None
        found += [f"{tower.blocks}.{index}" for index in range(len(list(blocks.children())))]
    return found


def make_plan(model: nn.Module, family: Family, ratio: float, allocate: Any = uniform) -> Plan:
    """Resolve a family's declaration on a model.

    Args:
        model: the model; meta tensors suffice.
        family: its declaration.
        ratio: share of each compressed Linear's parameters that is kept, in (0, 1).
        allocate: rank allocator.

    Raises:
        EmlocError: the ratio is out of range, or the declaration does not fit the model.
    """
    if not 0 < ratio < 1:
        raise EmlocError(
            f"The ratio is {ratio:g}; it is the share of parameters kept, above 0 and below 1.", "Try --ratio 0.6."
        )
    found: list[LinearPlan] = []
    for tower in family.towers:
        for block in (path for path in block_paths(model, family) if path.startswith(f"{tower.blocks}.")):
            for group in tower.input_groups:
                found += _plan_group(model, family, block, group)
    candidates = [linear for linear in found if linear.reason is None]
    if not candidates:
        raise EmlocError(f"The family {family.name!r} names no Linear of this model.", "Update the plugin.")
    ranks = allocate([(linear.out_features, linear.in_features) for linear in candidates], ratio)
    chosen = dict(zip((linear.path for linear in candidates), ranks, strict=True))
    return Plan(tuple(_with_rank(linear, chosen.get(linear.path)) for linear in found))


def _plan_group(model: nn.Module, family: Family, block: str, group: Sequence[str]) -> list[LinearPlan]:
    modules = dict(model.get_submodule(block).named_modules())
    present = tuple(f"{block}.{path}" for path in group if path in modules)
    planned = []
    for path in present:
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise EmlocError(
                f"{path} is a {type(module).__name__}, not a Linear, though the family {family.name!r} names it.",
                "The declaration does not fit this model: update the plugin.",
            )
        m, n = module.out_features, module.in_features
        tap = next((tap for pattern, tap in family.taps.items() if fnmatchcase(path, pattern)), cheaper_side(m, n))
        reason = next((reason for pattern, reason in family.keep_dense.items() if fnmatchcase(path, pattern)), None)
        planned.append(LinearPlan(path, block, present, m, n, None, tap, reason))
    return planned


def _with_rank(linear: LinearPlan, rank: int | None) -> LinearPlan:
    m, n = linear.out_features, linear.in_features
    if rank is not None and rank * (m + n) >= m * n:
        return LinearPlan(**{**vars(linear), "reason": "factors of that rank would be no smaller than the weight"})
    return LinearPlan(**{**vars(linear), "rank": rank})
