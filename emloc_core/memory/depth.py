"""A few blocks of a tower stand for all: how many are traced, and what the others hold at every moment of a step."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import product
from typing import Any, NamedTuple

#: Bytes by kind: weights, adapter, gradients, kv_cache, logits, activations (all else).
Composition = Counter[str]
#: A trace: the composition at the peak of each phase of a step, by phase, in order.
Phases = dict[str, Composition]
#: A first block and a last one, which form their own phases.
_OUTER = 2


@dataclass(frozen=True)
class Depth:
    """The blocks of a tower.

    Attributes:
        apart: how many of the first differ from the others: dense ones of a mixture of experts, say.
        period: after how many the others repeat; ``count`` if they do not.
    """

    count: int
    apart: int
    period: int

    @property
    def few(self) -> int:
        """How many are traced: the outer ones, those apart and a period, or more; all, if there are no more.

        The others are a whole number of periods.
        """
        enough = _OUTER + self.period + self.apart
        return min(enough + (self.count - enough) % self.period, self.count)

    @property
    def copies(self) -> int:
        """How many periods are not traced; they follow the first traced one, and are copies of it."""
        return (self.count - self.few) // self.period

    @property
    def copied(self) -> range:
        """The blocks of that period."""
        return range(self.apart + 1, self.apart + 1 + self.period)


class State(Enum):
    """How far a step has come with a block."""

    WAITING = auto()
    PASSED = auto()
    #: The forward pass has ended.
    KEPT = auto()
    #: The backward pass has passed it too.
    DONE = auto()


class Moment(NamedTuple):
    """When something is allocated.

    Attributes:
        states: of the copies of every tower, see :attr:`Copies.states`.
    """

    phase: str
    states: tuple[tuple[State, ...], ...] = ()


@dataclass
class Copies:
    """What each copy of a period of blocks holds: the same as the period itself.

    Attributes:
        held: what one holds in each state.
        states: those that the copies may be in: two while the period passes from one to the other. The copies pass
            before it or after it, so then each holds what the period began with or what it ends with; what is needed is
            linear in how many do, so one of the two ends is the peak.
        births: of the storages that the period made in the forward pass.
    """

    count: int
    held: dict[State, Composition]
    states: tuple[State, ...] = (State.WAITING,)
    births: range = range(0)

    def may_hold(self, states: Sequence[State]) -> list[Composition]:
        """Return what all copies hold if they are in the first of these states, in the second, and so on."""
        return [Counter({kind: self.count * size for kind, size in self.held[state].items()}) for state in states]


def extended(peaks: Mapping[Moment, Composition], towers: Sequence[Copies]) -> Phases:
    """Return the peak of each phase with all blocks, from the peaks of all moments with the few traced ones."""
    phases: Phases = {}
    for moment, peak in peaks.items():
        for held in product(*(tower.may_hold(states) for tower, states in zip(towers, moment.states, strict=True))):
            composition = Counter(peak)
            for copies in held:
                composition.update(copies)
            if composition.total() > phases.get(moment.phase, Counter()).total():
                phases[moment.phase] = composition
    return phases


def repetition(layouts: Sequence[Any]) -> tuple[int, int]:
    """Return how many layouts come before they repeat, and the period, with the least sum; 0 and all if none does."""
    kinds = [layouts.index(layout) for layout in layouts]  # numbers are quick to compare
    for both in range(1, len(kinds)):
        for apart in range(both):
            if kinds[both:] == kinds[apart : apart - both]:
                return apart, both - apart
    return 0, max(1, len(kinds))
