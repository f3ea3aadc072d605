"""The plan of compression: which Linears, to which ranks, and why."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from emloc_core.algorithms.allocation import Spectrum, global_budget, largest_rank, rank_cap, uniform
from emloc_core.algorithms.statistics import Side
from emloc_core.emulator.vocabulary import VocabularyPlan
from emloc_core.errors import EmlocError
from emloc_core.standins import Format
from emloc_core.standins.experts import ALIGNED

#: Bytes of tokens that are read at a time, for as many experts as they are sent to: all rows are read for them.
TOKENS_AT_ONCE = 1 << 30
NO_EXPERTS = "only Linears have spectra; the allocator uniform, which needs none, makes experts smaller too"
UNREACHED = "no calibration row passes through it"
NO_SMALLER = "factors of that rank would be no smaller than the weight"


@dataclass(frozen=True)
class LinearPlan:
    """What happens to one Linear.

    Attributes:
        group: its input group: paths that read the same input.
        rank: of its factors, once they have been shared out; None: its stand-in has none, or it stays dense.
        tap: which of its activations are captured.
    """

    path: str
    block: str
    group: tuple[str, ...]
    out_features: int
    in_features: int
    rank: int | None
    tap: Side
    reason: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {**asdict(self), "group": list(self.group)}

    @property
    def matrices(self) -> int:
        """How many matrices of this shape it is."""
        return 1

    @property
    def numbers(self) -> int:
        """How many numbers it is, dense."""
        return self.matrices * self.out_features * self.in_features

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, or of each matrix."""
        return self.out_features, self.in_features

    @property
    def is_replaced(self) -> bool:
        """Whether it gets a stand-in."""
        return self.reason is None

    def stored(self, format: Format) -> int:
        """Return how many numbers stand in for it."""
        return self.matrices * format.numbers(self.shape, self.rank)

    def nbytes(self, format: Format, dtype: torch.dtype) -> int:
        """Return the bytes of what stands in for it, in an emulator of a base of this dtype."""
        return self.matrices * format.nbytes(self.shape, self.rank, dtype)


@dataclass(frozen=True)
class ExpertsPlan(LinearPlan):
    """What happens to a stack of experts: as to so many Linears, all of one rank."""

    experts: int = 1

    @property
    def owner(self) -> str:
        """Path of the module that holds it."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Name of the parameter in that module."""
        return self.path.rpartition(".")[2]

    @property
    def matrices(self) -> int:
        """How many matrices of this shape it is."""
        return self.experts


@dataclass(frozen=True)
class Kept:
    """What the family keeps dense.

    Attributes:
        parameters: number of parameters in the modules that it matches, tied ones included.
    """

    pattern: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class RankPlan:
    """What happens to the Linears and experts that a family names, in execution order, and what it keeps dense.

    ``vocabulary`` are the matrices of output layer and embeddings that are packed.
    """

    linears: tuple[LinearPlan, ...]
    kept: tuple[Kept, ...] = ()
    experts: tuple[ExpertsPlan, ...] = ()
    vocabulary: tuple[VocabularyPlan, ...] = ()

    @property
    def planned(self) -> tuple[LinearPlan, ...]:
        """The Linears, and the stacks of experts."""
        return (*self.linears, *self.experts)

    @property
    def width(self) -> int:
        """The width of the hidden states, in the largest tower: the size that most of the weights have in common."""
        weights: Counter[int] = Counter()
        for linear in self.planned:
            weights.update(dict.fromkeys(linear.shape, linear.numbers))
        return weights.most_common(1)[0][0]

    @property
    def ranks(self) -> dict[str, int | None]:
        """Rank by path, of the Linears and stacks of experts that get stand-ins."""
        return {linear.path: linear.rank for linear in self.planned if linear.is_replaced}

    def in_block(self, block: str) -> list[LinearPlan]:
        """Return the Linears of one block that get stand-ins."""
        return [linear for linear in self.linears if linear.block == block and linear.is_replaced]

    def experts_in_block(self, block: str) -> dict[str, list[ExpertsPlan]]:
        """Return the stacks of a block that get stand-ins, by path of their module."""
        stacks: dict[str, list[ExpertsPlan]] = defaultdict(list)
        for stack in self.experts:
            if stack.block == block and stack.is_replaced:
                stacks[stack.owner].append(stack)
        return dict(stacks)

    @property
    def has_experts(self) -> bool:
        """Whether a stack of experts may become smaller."""
        return any(stack.is_replaced for stack in self.experts)

    @property
    def candidates(self) -> list[LinearPlan]:
        """The Linears without a reason to stay dense."""
        return [linear for linear in self.linears if linear.is_replaced]

    def with_ranks(self, ranks: Mapping[str, int]) -> "RankPlan":
        """Return the plan with ranks; Linears without one, or whose factors save nothing, stay dense."""
        return self._map(lambda linear: _with_rank(linear, ranks.get(linear.path)))

    def as_described(self, rows: Sequence[Mapping[str, Any]]) -> "RankPlan":
        """Return the plan of an emulator, whose manifest describes its Linears like this."""
        values = {row["path"]: {"rank": row["rank"], "reason": row["reason"]} for row in rows}
        return self._map(lambda linear: replace(linear, **values.get(linear.path, {})))

    def at_caps(self) -> "RankPlan":
        """Return the plan with every rank, a uniform one, at its cap under the allocator ``global``."""
        return self._map(lambda linear: replace(linear, rank=linear.rank and rank_cap(linear.rank, linear.shape)))

    def dense(self, paths: Collection[str], reason: str) -> "RankPlan":
        """Return the plan with the Linears and stacks of experts at ``paths`` kept dense, for that reason."""
        return self._map(lambda linear: replace(linear, rank=None, reason=reason) if linear.path in paths else linear)

    def without_experts(self, reason: str) -> "RankPlan":
        """Return the plan with all experts kept dense, for that reason unless there is another one."""
        return self.dense([stack.path for stack in self.experts if stack.is_replaced], reason)

    def without_vocabulary(self) -> "RankPlan":
        """Return the plan with output layer and embeddings dense."""
        return replace(self, vocabulary=())

    def _map(self, change: Callable[[Any], Any]) -> "RankPlan":
        return replace(self, linears=tuple(map(change, self.linears)), experts=tuple(map(change, self.experts)))

    def tapped(self, tap: Callable[[Any], Any]) -> "RankPlan":
        """Return the plan with activations captured in other ways."""
        return self._map(lambda linear: replace(linear, tap=tap(linear.tap)))

    def lines(self, format: Format) -> list[str]:
        """Return lines: number, shape and stand-in of every sort of Linear, then what stays dense, and why."""
        sorts: dict[tuple[str, str, str | None], list[int]] = defaultdict(list)
        for linear in self.planned:
            name, shape = linear.path.rpartition(".")[2], f"{linear.out_features} x {linear.in_features}"
            if isinstance(linear, ExpertsPlan):
                shape = f"{linear.experts} experts of {shape}"
            sorts[name, shape, linear.reason].append(linear.rank or 0)
        width = max((len(name) for name, *_ in sorts), default=0)
        lines = []
        for (name, shape, why), ranks in sorts.items():
            least, most = min(ranks), max(ranks)
            become = f"dense: {why}" if why else format.describe(f"{least}" if least == most else f"{least} to {most}")
            lines.append(f"{len(ranks):4d} x {name:<{width}} {shape} -> {become}")
        lines += [f"   1 x {matrix}" for matrix in self.vocabulary]
        lines += [f"{kept.parameters:,} parameters of {kept.pattern} stay dense: {kept.reason}" for kept in self.kept]
        return lines

    def parameters(self, format: Format) -> tuple[int, int]:
        """Return the number of parameters of the named Linears and experts before and after."""
        before = sum(linear.numbers for linear in self.planned)
        after = sum(linear.stored(format) if linear.is_replaced else linear.numbers for linear in self.planned)
        return before, after


def allocated(
    plan: RankPlan, ratio: float | None, spectrum: Callable[[LinearPlan], Spectrum] | None = None
) -> RankPlan:
    """Return the plan with ranks; see :mod:`emloc_core.algorithms.allocation`.

    Args:
        plan: its candidates get ranks.
        ratio: fraction of their parameters to keep, in (0, 1).
        spectrum: returns a Linear's spectrum, by which ranks are shared out; None: uniformly.

    Raises:
        EmlocError: the ratio is out of range, or the ranks save nothing.
    """
    if ratio is None or not 0 < ratio < 1:
        raise EmlocError(
            f"The ratio is {ratio}; it is the fraction of parameters to keep, above 0 and below 1.", "Try --ratio 0.6."
        )
    linears = plan.candidates
    if not linears:
        return plan
    shapes = [linear.shape for linear in linears]
    ranks = global_budget(shapes, ratio, list(map(spectrum, linears))) if spectrum else uniform(shapes, ratio)
    by_path = dict(zip((linear.path for linear in linears), ranks, strict=True))
    # The experts of a stack share a rank in any case: they are multiplied by together.
    by_path |= {stack.path: _expert_rank(stack, ratio) for stack in plan.experts if stack.is_replaced}
    ranked = plan.with_ranks(by_path)
    if not ranked.ranks:
        raise EmlocError("At this ratio nothing becomes smaller.", "Give a smaller --ratio, or another --kind.")
    return ranked


def _expert_rank(planned: ExpertsPlan, ratio: float) -> int:
    (rank,) = uniform([planned.shape], ratio)
    return max(ALIGNED, rank - rank % ALIGNED)  # or every product would have to be filled up


def _with_rank(linear: LinearPlan, rank: int | None) -> Any:
    if linear.is_replaced and (rank is None or rank > largest_rank(*linear.shape)):
        return replace(linear, rank=None, reason=NO_SMALLER)
    return replace(linear, rank=rank)
