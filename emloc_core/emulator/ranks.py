"""The plan of compression: which Linears, to which ranks, and why."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from operator import index
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.allocation import Spectrum, largest_rank, uniform, wants_spectra
from emloc_core.algorithms.statistics import cheaper_side
from emloc_core.errors import EmlocError
from emloc_core.experts import stacks
from emloc_core.family import Family
from emloc_core.kinds import Kind
from emloc_core.plugins.builtin import named

#: Ranks of experts are multiples of it: torch multiplies groups whose rows have a multiple of 16 bytes, 8 of bf16.
_ALIGNED = 8
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

    @property
    def numbers(self) -> int:
        """How many numbers it is, dense."""
        return self.out_features * self.in_features

    def stored(self, rank: int) -> int:
        """Return how many numbers its factors are."""
        return rank * (self.out_features + self.in_features)


@dataclass(frozen=True)
class ExpertsPlan(LinearPlan):
    """What happens to a stack of experts: as to so many Linears, all of one rank.

    Attributes:
        path: path of the parameter.
        experts: how many there are.
    """

    experts: int = 1

    @property
    def numbers(self) -> int:
        """How many numbers it is, dense."""
        return self.experts * super().numbers

    def stored(self, rank: int) -> int:
        """Return how many numbers its factors are."""
        return self.experts * super().stored(rank)


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
    """What happens to the Linears and experts that a family names, in execution order, and what it keeps dense."""

    linears: tuple[LinearPlan, ...]
    kept: tuple[Kept, ...] = ()
    experts: tuple[ExpertsPlan, ...] = ()

    @property
    def planned(self) -> tuple[LinearPlan, ...]:
        """The Linears, and the stacks of experts."""
        return (*self.linears, *self.experts)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by path, for the Linears and stacks of experts that are compressed."""
        return {each.path: each.rank for each in self.planned if each.rank is not None}

    def in_block(self, block: str) -> list[LinearPlan]:
        """Return the compressed Linears of one block."""
        return [linear for linear in self.linears if linear.block == block and linear.rank is not None]

    def experts_in_block(self, block: str) -> dict[str, list[ExpertsPlan]]:
        """Return the compressed stacks of a block by path of their module."""
        found: dict[str, list[ExpertsPlan]] = defaultdict(list)
        for each in self.experts:
            if each.block == block and each.rank is not None:
                found[each.path.rpartition(".")[0]].append(each)
        return dict(found)

    @property
    def candidates(self) -> list[LinearPlan]:
        """The Linears without a reason to stay dense."""
        return [linear for linear in self.linears if linear.reason is None]

    def with_ranks(self, ranks: Mapping[str, int]) -> "RankPlan":
        """Return the plan with other ranks; Linears without one, or whose rank saves nothing, stay dense."""
        return self._each(lambda each: _with_rank(each, ranks.get(each.path)))

    def at_full_rank(self) -> "RankPlan":
        """Return the plan with every candidate at full rank, which stands for its weight as it is."""
        return self._each(
            lambda each: replace(each, rank=min(each.out_features, each.in_features) if each.reason is None else None)
        )

    def dense(self, paths: Collection[str], reason: str) -> "RankPlan":
        """Return the plan with the Linears and stacks of experts at ``paths`` kept dense, for that reason."""
        return self._each(lambda each: replace(each, rank=None, reason=reason) if each.path in paths else each)

    def without_experts(self, reason: str) -> "RankPlan":
        """Return the plan with all experts kept dense, for that reason unless there is another one."""
        return self.dense([each.path for each in self.experts if each.reason is None], reason)

    def _each(self, change: Callable[[Any], Any]) -> "RankPlan":
        return replace(self, linears=tuple(map(change, self.linears)), experts=tuple(map(change, self.experts)))

    def on_inputs(self) -> "RankPlan":
        """Return the plan with the inputs captured where it would be the outputs."""
        linears = (replace(each, tap="input") if each.tap == "output" else each for each in self.linears)
        return replace(self, linears=tuple(linears))

    def lines(self) -> list[str]:
        """Return a line per kind of Linear with number, shape and ranks, then lines for what stays dense, and why."""
        kinds: dict[tuple[str, str, str | None], list[int]] = defaultdict(list)
        for linear in self.planned:
            name, shape = linear.path.rpartition(".")[2], f"{linear.out_features} x {linear.in_features}"
            if isinstance(linear, ExpertsPlan):
                shape = f"{linear.experts} experts of {shape}"
            kinds[name, shape, linear.reason if linear.rank is None else None].append(linear.rank or 0)
        width = max((len(name) for name, *_ in kinds), default=0)
        found = []
        for (name, shape, why), ranks in kinds.items():
            least, most = min(ranks), max(ranks)
            rank = f"rank {least}" if least == most else f"rank {least} to {most}"
            dense = f"dense: {why}" if why else "dense"
            found.append(f"{len(ranks):4d} x {name:<{width}} {shape} -> {rank if least else dense}")
        found += [f"{kept.parameters:,} parameters of {kept.pattern} stay dense: {kept.reason}" for kept in self.kept]
        return found

    def parameters(self) -> tuple[int, int]:
        """Return the number of parameters of the named Linears and experts before and after."""
        before = sum(linear.numbers for linear in self.planned)
        after = sum(
            linear.numbers
            if linear.rank in (None, min(linear.out_features, linear.in_features))
            else linear.stored(linear.rank)
            for linear in self.planned
        )
        return before, after


def planned_bytes(planned: LinearPlan, kind: Kind, dtype: torch.dtype) -> int:
    """Return the bytes of what stands in for a Linear, or for a stack of experts, at its rank.

    Args:
        planned: has a rank.
        kind: of emulator.
        dtype: of the base.
    """
    count = planned.experts if isinstance(planned, ExpertsPlan) else 1
    return count * kind.nbytes((planned.out_features, planned.in_features), planned.rank or 0, dtype)


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
        names = [name for name, _ in blocks.named_children()]
        if names != [str(index) for index in range(len(names))]:
            raise EmlocError(
                f"{tower.blocks} is a {type(blocks).__name__}, not a list of blocks, though the family "
                f"{family.name!r} declares it as its {tower.name} tower.",
                "Name the ModuleList whose children are the blocks: print(model) shows the paths.",
                code="plugin",
            )
        found += [f"{tower.blocks}.{name}" for name in names]
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
    experts: list[ExpertsPlan] = []
    blocks = block_paths(model, family)
    if not blocks:
        raise EmlocError("The model has no blocks.", "Check the number of layers in its config.json.")
    for tower in family.towers:
        for block in (path for path in blocks if path.startswith(f"{tower.blocks}.")):
            for group in tower.input_groups:
                found += _plan_group(model, family, block, group)
            for path in tower.experts:
                experts += _plan_experts(model, family, block, path)
    _require_one_group(found)
    named = {linear.path for linear in found} | {each.group[0] for each in experts}
    plan = RankPlan(tuple(found), tuple(_kept(model, family, named)), tuple(experts))
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
    chosen = dict(zip((linear.path for linear in linears), whole, strict=True))
    # The experts of a stack share a rank, whatever the allocator: they are multiplied by together.
    chosen |= {each.path: _expert_rank(each, ratio) for each in plan.experts if each.reason is None}
    found = plan.with_ranks(chosen)
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


def _plan_experts(model: nn.Module, family: Family, block: str, path: str) -> list[ExpertsPlan]:
    owner = f"{block}.{path}"
    if path not in dict(model.get_submodule(block).named_modules()):
        return []
    experts = model.get_submodule(owner)
    reason = next((reason for pattern, reason in family.keep_dense.items() if fnmatchcase(owner, pattern)), None)
    found = []
    for name in stacks(experts):
        count, m, n = experts.get_parameter(name).shape
        found.append(
            ExpertsPlan(f"{owner}.{name}", block, (owner,), m, n, None, cheaper_side(m, n), reason, experts=count)
        )
    return found


def _expert_rank(planned: ExpertsPlan, ratio: float) -> int:
    (rank,) = uniform([(planned.out_features, planned.in_features)], ratio)
    return max(_ALIGNED, rank - rank % _ALIGNED)


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


def _with_rank(linear: LinearPlan, rank: int | None) -> Any:
    if rank is not None and rank > largest_rank(linear.out_features, linear.in_features):
        return replace(linear, rank=None, reason=NO_SMALLER)
    return replace(linear, rank=rank)
