"""The measurements of ``quality.py`` by what is asked of them, and what a LoRA recovers in each."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from quality_cells import EXACT, FULL, LORA, SCRATCH, STEPS, Cell, best_of

#: Measurements that differ in nothing of this are of one way, at several learning rates.
_WAY = ("task", "base", "kind", "memory", "steps", "seed", "batch", *LORA)


class Table:
    """The measurements by what is asked of them.

    Attributes:
        rows: all of them, with what each leaves out because it is as usual.
        best: of those that differ in their learning rate alone, the best by their selection rows.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = [{**asdict(Cell.from_row(row)), **row} for row in rows]
        ways: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            ways.setdefault(tuple(row[key] for key in _WAY), []).append(row)
        self.best = [best_of(group) for group in ways.values()]

    def control(self, row: dict[str, Any], steps: int) -> dict[str, Any] | None:
        """Return the systems of the LoRA of so many steps on a cell's base, otherwise like the cell's; or None."""
        wanted = {**row, "kind": FULL, "memory": 1, "steps": steps}
        return next((row["systems"] for row in self.best if all(row[key] == wanted[key] for key in _WAY)), None)

    def recovery(self, row: dict[str, Any], system: str) -> float | None:
        """Return the recovery of a system of a cell; the LoRA on the base has as many steps in all.

        After the longest tuning it has taken exact steps itself, which have more rows than its other steps. Exact steps
        from scratch are compared with what polishing is compared with, to stand beside it.
        """
        further = EXACT[-1] if system.startswith("polish") else 0
        beside, reference = self.control(row, row["steps"]), system
        if beside is None or reference not in beside:
            steps = STEPS + EXACT[-1] if system == SCRATCH else row["steps"] + further
            beside, reference = self.control(row, steps), FULL
        if beside is None or system not in row["systems"]:
            return None
        base, full = (beside[name]["nll"] for name in ("base", reference))
        return float((base - row["systems"][system]["nll"]) / (base - full))

    def describe(self, row: dict[str, Any], system: str) -> str:
        """Return the loss of a system of a cell, and its recovery in brackets; nothing where it was not measured."""
        recovery = self.recovery(row, system)
        return "" if recovery is None else f"{row['systems'][system]['nll']:.3f} ({recovery:.3f})"

    def recoveries(self, task: str, kind: str, memory: float, system: str) -> list[float]:
        """Return the recovery with every base and seed that was measured."""
        wanted = (task, kind, memory)
        matching = [row for row in self.best if (row["task"], row["kind"], row["memory"]) == wanted]
        return self.recoveries_of(matching, system)

    def recoveries_of(self, rows: Iterable[dict[str, Any]], system: str) -> list[float]:
        """Return the recovery of a system in these measurements, where it is known."""
        recoveries = [self.recovery(row, system) for row in rows]
        return [recovery for recovery in recoveries if recovery is not None]
