"""A few blocks of a tower stand for all: how many are traced, and how what they need grows to the whole depth."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emloc_core.memory.tracing import Phases

#: A first block and a last one, which form their own phases.
_OUTER = 2


@dataclass(frozen=True)
class Depth:
    """The blocks of a tower.

    Attributes:
        count: how many there are.
        apart: how many of the first differ from the others: dense ones of a mixture of experts, say.
        period: after how many the others repeat; ``count`` if they do not.
    """

    count: int
    apart: int
    period: int

    @property
    def few(self) -> int:
        """How many to trace first: a period between the outer ones and those apart, or more; all, if that is no more.

        The others are a whole number of periods.
        """
        enough = _OUTER + self.period + self.apart
        few = enough + (self.count - enough) % self.period
        return few if few + self.period < self.count else self.count


def repetition(layouts: Sequence[Any]) -> tuple[int, int]:
    """Return how many come before a sequence repeats, and its period: the fewest together; 0 and all if none does."""
    kinds = [layouts.index(layout) for layout in layouts]  # numbers are quick to compare
    for both in range(1, len(kinds)):
        for apart in range(both):
            if kinds[both:] == kinds[apart : apart - both]:
                return apart, both - apart
    return 0, max(1, len(kinds))


def extend(trace: Callable[[Mapping[str, int]], "Phases"], depths: Mapping[str, Depth]) -> "Phases":
    """Trace a few blocks of each tower, then a period more of each in turn, and extrapolate the difference to all.

    Phases are divided so that each peak grows linearly with depth. Towers whose blocks do not repeat are traced whole.

    Args:
        trace: takes how many blocks each tower is to have.
        depths: the towers, by path.
    """
    few = {path: depth.few for path, depth in depths.items()}
    phases = trace(few)
    extended = {phase: Counter(peak) for phase, peak in phases.items()}
    for path, depth in depths.items():
        if depth.count == few[path]:
            continue
        deeper = trace({**few, path: few[path] + depth.period})
        times = (depth.count - few[path]) // depth.period
        for phase, peak in phases.items():
            for kind in peak.keys() | deeper[phase].keys():
                extended[phase][kind] += times * (deeper[phase][kind] - peak[kind])
    return extended
