"""What ``quality.py`` measures: its cells, the most telling first."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quality_rows import TEXTS

PICTURES = "pictures"
TASKS = (*TEXTS, PICTURES)
STEPS, EXACT = 60, (10, 20)
LEARNING_RATE = 1e-3
#: Those that a LoRA on the base may choose from.
LEARNING_RATES = (1e-3, 2e-3, 5e-4)
MEMORIES = (0.11, 0.17, 0.28, 0.6)
#: Kind of the emulator that is recommended for a memory; four-bit weights take no more than 0.28 at 0.6 either.
RECOMMENDED = {0.11: ("1.6-bit", 0.11), 0.17: ("2.7-bit", 0.17), 0.28: ("nf4", 0.28), 0.6: ("nf4", 0.28)}
#: What else there is below four bits.
RIVALS = (("mixed", 0.17), ("low-rank-nf4", 0.17), ("low-rank-nf4", 0.11))
#: From the literature, for text; see ``quality_baselines.py``.
BASELINES = (
    ("pruned-nf4", 0.17),
    ("hqq", 0.16),
    ("pruned-nf4", 0.11),
    ("hqq", 0.22),
    ("pruned", 0.28),
    ("depth", 0.28),
)
#: Bytes that a ratio counts in, where a kind has one: of a number of the factors, scales included.
BYTES = {"low-rank": 2, "low-rank-nf4": 4.5 / 8, "mixed": 2}
FULL, SCRATCH = "full", "exact"


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        task: of :data:`TASKS`.
        kind: of emulator; or a baseline; or ``full``, a LoRA on the base, or ``exact``, exact steps from scratch.
        memory: of the block Linears; 1 for controls.
        seed: of the rows and of the tuning.
        steps: of the tuning.
        learning_rate: of the tuning.
    """

    task: str
    kind: str
    memory: float
    seed: int
    steps: int = STEPS
    learning_rate: float = LEARNING_RATE

    @property
    def name(self) -> str:
        """A name for its directory."""
        return f"{self.task}-{self.kind}-{self.memory:g}-{self.seed}-{self.steps}-{self.learning_rate:g}"


def cells(seeds: int, known: Sequence[dict[str, Any]]) -> Iterator[Cell]:
    """Return all cells, the most telling first; learning rates of further seeds are those found best so far."""
    tasks = TASKS
    recommended = list(dict.fromkeys(RECOMMENDED[memory] for memory in reversed(MEMORIES)))
    yield from (Cell(task, FULL, 1, 0) for task in tasks)
    yield from (Cell(task, *way, 0) for way in recommended for task in tasks)
    yield from (Cell(task, FULL, 1, 0, STEPS + EXACT[-1]) for task in tasks)
    yield from (Cell(task, *way, 0) for way in RIVALS for task in tasks)
    yield from (Cell(task, *way, 0) for way in BASELINES for task in TEXTS)
    rates = itertools.product(LEARNING_RATES[1:], (STEPS, STEPS + EXACT[-1]), tasks)
    yield from (Cell(task, FULL, 1, 0, steps, rate) for rate, steps, task in rates)
    yield from (Cell(task, SCRATCH, 1, 0, EXACT[-1]) for task in tasks)
    yield from (Cell(task, "low-rank", memory, 0) for memory in MEMORIES[::-1] for task in tasks)
    for seed in range(1, seeds):
        for task in tasks:
            yield from (
                Cell(task, FULL, 1, seed, steps, best_rate(known, task, steps)) for steps in (STEPS, STEPS + EXACT[-1])
            )
        yield from (Cell(task, *way, seed) for way in recommended for task in tasks)
        yield from (Cell(task, SCRATCH, 1, seed, EXACT[-1]) for task in tasks)


def best_rate(rows: Sequence[dict[str, Any]], task: str, steps: int) -> float:
    """Return the learning rate of a LoRA on the base with the least loss on the selection rows of the first seed."""
    tried = [row for row in rows if (row["task"], row["kind"], row["seed"], row["steps"]) == (task, FULL, 0, steps)]
    return min(tried, key=lambda row: row["selection"])["learning_rate"] if tried else LEARNING_RATE
