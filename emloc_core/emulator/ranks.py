"""The plan of compression: which Linears, to which ranks, and why."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from operator import index
from typing import Any

from torch import nn

from emloc_core.algorithms.allocation import Spectrum, largest_rank, uniform, wants_spectra
from emloc_core.algorithms.statistics import cheaper_side
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.plugins.builtin import named

NO_SMALLER = "factors of that rank would be no smaller than the weight"


@dataclass(frozen=True)
class LinearPlan:
    """What happens to one Linear.

    Attributes:
        path: module path.
        block: path of the block that holds it.
        group: its input group: paths that read the same input.
        out_features, in_features: shape of the weight.
        rank: rank of the factors; None keeps the Linear dense.
        tap: how its activations are captured: ``input``, ``output``, or the family's own function.
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
class Kept:
    """What the family keeps dense.

    Attributes:
        pattern: glob pattern of module paths.
        parameters: number of parameters in the modules that it matches, tied ones included.
        reason: why.
    """

    pattern: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class RankPlan:
    """What happens to every Linear that the family names, in execution order, and what it keeps dense."""

    linears: tuple[LinearPlan, ...]
    kept: tuple[Kept, ...] = ()

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module path, for the Linears that are compressed."""
        return {linear.path: linear.rank for linear in self.linears if linear.rank is not None}

    def in_block(self, block: str) -> list[LinearPlan]:
        """Return the compressed Linears of one block."""
        return [linear for linear in self.linears if linear.block == block and linear.rank is not None]

    @property
    def candidates(self) -> list[LinearPlan]:
        """The Linears without a reason to stay dense."""
        return [linear for linear in self.linears if linear.reason is None]

    def with_ranks(self, ranks: Mapping[str, int]) -> "RankPlan":
        """Return the plan with other ranks; Linears without one, or whose rank saves nothing, stay dense."""
        return replace(self, linears=tuple(_with_rank(linear, ranks.get(linear.path)) for linear in self.linears))

    def at_full_rank(self) -> "RankPlan":
        """Return the plan with every candidate at full rank, which stands for its weight as it is."""
        linears = (
            replace(each, rank=min(each.out_features, each.in_features) if each.reason is None else None)
            for each in self.linears
        )
        return replace(self, linears=tuple(linears))

    def dense(self, paths: Collection[str], reason: str) -> "RankPlan":
        """Return the plan with the Linears at ``paths`` kept dense, for that reason."""
        linears = (replace(each, rank=None, reason=reason) if each.path in paths else each for each in self.linears)
        return replace(self, linears=tuple(linears))

    def lines(self) -> list[str]:
        """Return a line per kind of Linear with number, shape and ranks, then lines for what stays dense, and why."""
        kinds: dict[tuple[str, int, int, str | None], list[int]] = defaultdict(list)
        for linear in self.linears:
            name = linear.path.rpartition(".")[2]
            why = linear.reason if linear.rank is None else None
            kinds[name, linear.out_features, linear.in_features, why].append(linear.rank or 0)
        width = max((len(name) for name, *_ in kinds), default=0)
        found = []
        for (name, m, n, why), ranks in kinds.items():
            least, most = min(ranks), max(ranks)
            rank = f"rank {least}" if least == most else f"rank {least} to {most}"
            dense = f"dense: {why}" if why else "dense"
            found.append(f"{len(ranks):4d} x {name:<{width}} {m} x {n} -> {rank if least else dense}")
        found += [f"{kept.parameters:,} parameters of {kept.pattern} stay dense: {kept.reason}" for kept in self.kept]
        return found

    def parameters(self) -> tuple[int, int]:
        """Return the number of parameters of the named Linears before and after."""
        before = sum(linear.out_features * linear.in_features for linear in self.linears)
        after = sum(
            linear.out_features * linear.in_features
            if linear.rank in (None, min(linear.out_features, linear.in_features))
            else (linear.rank or 0) * (linear.out_features + linear.in_features)
            for linear in self.linears
        )
        return before, after


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
                code="plugin",
            ) from None
        found += [f"{tower.blocks}.{index}" for index in range(len(list(blocks.children())))]
    return found


def find_linears(model: nn.Module, family: Family) -> RankPlan:
    """Resolve a family's declaration on a model: every Linear that it names, without ranks.

    Args:
        model: the model; meta tensors suffice.
        family: its declaration.

    Raises:
        EmlocError: the declaration does not fit the model.
    """
    found: list[LinearPlan] = []
    blocks = block_paths(model, family)
    if not blocks:
        raise EmlocError("The model has no blocks.", "Check the number of layers in its config.json.")
    for tower in family.towers:
        for block in (path for path in blocks if path.startswith(f"{tower.blocks}.")):
            for group in tower.input_groups:
                found += _plan_group(model, family, block, group)
    _require_one_group(found)
    plan = RankPlan(tuple(found), tuple(_kept(model, family, {linear.path for linear in found})))
    if not plan.candidates:
        raise EmlocError(
            f"The family {family.name!r} names no Linear of this model.", "Update the plugin.", code="plugin"
        )
    return plan


def plan_ranks(
    model: nn.Module, family: Family, ratio: float, allocate: Callable[..., Sequence[int]] = uniform
) -> RankPlan:
    """Resolve a family's declaration on a model, with ranks.

    Args:
        model: the model; meta tensors suffice.
        family: its declaration.
        ratio: fraction of each compressed Linear's parameters to keep, in (0, 1).
        allocate: rank allocator that takes shapes and ratio; see :mod:`emloc_core.algorithms.allocation`.

    Raises:
        EmlocError: the ratio is out of range, or the declaration does not fit the model.
    """
    return allocated(find_linears(model, family), ratio, allocate)


def allocated(
    plan: RankPlan,
    ratio: float,
    allocate: Callable[..., Sequence[int]],
    spectrum: Callable[[LinearPlan], Spectrum] | None = None,
    name: str = "uniform",
) -> RankPlan:
    """Return the plan with the ranks that an allocator gives.

    Args:
        plan: its candidates get ranks.
        ratio: fraction of their parameters to keep, in (0, 1).
        allocate: rank allocator; see :mod:`emloc_core.algorithms.allocation`.
        spectrum: returns a Linear's spectrum, for an allocator that needs it.
        name: name of the allocator, for messages.

    Raises:
        EmlocError: the ratio is out of range, or the allocator's ranks are invalid or save nothing.
    """
    require_ratio(ratio)
    linears = plan.candidates
    if not linears:
        return plan
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    known = {}
    if wants_spectra(allocate) and spectrum is not None:
        known["spectra"] = [spectrum(linear) for linear in linears]
    with named(f"The rank allocator {name!r}"):
        ranks = allocate(shapes, ratio, **known)
    remedy = "Choose another --allocator, or update the plugin."
    try:
        whole = [index(rank) for rank in ranks]
    except TypeError:
        whole = []
    if len(whole) != len(linears) or min(whole) < 1:
        raise EmlocError(
            f"The rank allocator {name!r} gave {ranks!r:.60}, not an integer of at least 1 for each of {len(linears)} "
            "Linears.",
            remedy,
            code="plugin",
        )
    found = plan.with_ranks(dict(zip((linear.path for linear in linears), whole, strict=True)))
    if not found.ranks:
        raise EmlocError(f"The ranks of the rank allocator {name!r} make nothing smaller.", remedy)
    return found


def require_ratio(ratio: float) -> None:
    """Refuse a ratio outside (0, 1).

    Raises:
        EmlocError: it is.
    """
    if not 0 < ratio < 1:
        raise EmlocError(
            f"The ratio is {ratio:g}; it is the fraction of parameters to keep, above 0 and below 1.",
            "Try --ratio 0.6.",
        )


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
                code="plugin",
            )
        m, n = module.out_features, module.in_features
        tap = next((tap for pattern, tap in family.taps.items() if fnmatchcase(path, pattern)), cheaper_side(m, n))
        reason = next((reason for pattern, reason in family.keep_dense.items() if fnmatchcase(path, pattern)), None)
        planned.append(LinearPlan(path, block, present, m, n, None, tap, reason))
    return planned


def _require_one_group(linears: Sequence[LinearPlan]) -> None:
    counts = Counter(linear.path for linear in linears)
    if several := [path for path, count in counts.items() if count > 1]:
        more = f" ({len(several) - 1} more like it)" if len(several) > 1 else ""
        raise EmlocError(
            f"{several[0]} stands in several input groups{more}.",
            "The plugin has to name every Linear once.",
            code="plugin",
        )


def _kept(model: nn.Module, family: Family, planned: Collection[str]) -> list[Kept]:
    """Count the parameters, except planned Linears, of modules at or below paths that a pattern matches."""
    sizes: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        modules = [path, *(path[:index] for index, letter in enumerate(path) if letter == ".")]
        pattern = next((p for p in family.keep_dense if any(fnmatchcase(module, p) for module in modules)), None)
        if pattern is not None and path not in planned:
            sizes[pattern] += parameter.numel()
    return [Kept(pattern, size, family.keep_dense[pattern]) for pattern, size in sizes.items()]


def _with_rank(linear: LinearPlan, rank: int | None) -> LinearPlan:
    if rank is not None and rank > largest_rank(linear.out_features, linear.in_features):
        return replace(linear, rank=None, reason=NO_SMALLER)
    return replace(linear, rank=rank)
