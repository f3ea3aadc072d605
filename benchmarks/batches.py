"""Rows of an exact step: 8 as in tuning, or 32, which take as many reads of the model.

Starts are LoRAs tuned for 60 steps of 8 rows, on a small emulator and carried over to the base, or on the base
itself. From there 20 exact steps are taken at half of tuning's rate. All else is as in ``quality.py``.

Recovery is the share of the control's gain, ``(base - x) / (base - control)``: of a control with as many ordinary steps
in all, of 8 rows (measured by ``quality.py``); and of one that took as many exact steps, of 32 rows.

About two hours. Every start is added to ``results/batches.json`` as soon as it is measured, and not repeated.
``python benchmarks/batches.py arithmetic`` measures one task.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from harness import RESULTS, goal, in_process, markdown, write_results
from quality import Metered, Scores, base_of, corrected, digest, known_rows, trained, tuned, write_rows
from quality_cells import BATCH, DEMO, EXACT, FULL, STEPS, Cell
from quality_rows import TEXTS
from quality_stages import polished
from quality_table import Table

ROOT = Path("build/quality")
WAYS = (("low-rank-nf4", 0.11), (FULL, 1.0))
LARGER = 32
RATE = 2e-3
ALL_STEPS = STEPS + EXACT[-1]
GOAL = 0.99


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Measure a start; called in a process of its own. One that was interrupted resumes after its last stage."""
    cell = Cell(**values)
    directory = ROOT / f"batches-{cell.name}"
    directory.mkdir(exist_ok=True)
    rows, base, metered = write_rows(directory, cell, ROOT), base_of(cell.model, cell.task, ROOT), Metered()
    if cell.kind == FULL:
        start, batches = trained(base, directory / "adapter", cell, rows, metered), [LARGER]
    else:
        _, _, adapter = tuned(base, directory, cell, rows, metered)
        start, batches = directory / "start", [BATCH, LARGER]
        metered("auto", partial(corrected, adapter, base, rows, "auto", start), start)
    scores = Scores(base, rows["test"])
    losses = {"base": scores.measure(None)["nll"], "start": scores.measure(start)["nll"]}
    for batch in batches:
        steps, output = (EXACT[-1], cell.learning_rate / 2, cell.seed), directory / f"polished{batch}"
        metered(f"polish, {batch}", partial(polished, start, base, rows, *steps, output, batch=batch), output)
        losses[str(batch)] = scores.measure(output)["nll"]
    shutil.rmtree(directory)
    return {**values, "base": digest(base), "losses": losses}


def report(rows: list[dict[str, Any]]) -> None:
    """Write what was measured so far; a task is shown when its control is measured, too."""
    own = {row["task"]: row["losses"] for row in rows if row["kind"] != FULL}
    such = {row["task"]: row["losses"][str(LARGER)] for row in rows if row["kind"] == FULL}
    longer = {"kind": FULL, "steps": ALL_STEPS, "seed": 0, "model": DEMO}
    ordinary = {row["task"]: row["systems"][FULL]["nll"]
                for row in Table(known_rows()).best if longer.items() <= row.items()}  # fmt: skip
    lines, recoveries = [], []
    for task in (task for task in TEXTS if task in own and task in such):
        base, start, usual, larger = (own[task][name] for name in ("base", "start", str(BATCH), str(LARGER)))
        beside = [(base - loss) / (base - ordinary[task]) for loss in (start, usual, larger)]
        beside_such = (base - larger) / (base - such[task])
        described = (f"{loss:.3f} ({share:.3f})" for loss, share in zip((start, usual, larger), beside, strict=True))
        lines.append([task, f"{base:.3f}", f"{ordinary[task]:.3f}", *described, f"{such[task]:.3f}",
                      f"{beside_such:.3f}"])  # fmt: skip
        recoveries.append((beside[-1], beside_such))
    header = ["task", "base", f"{ALL_STEPS} ordinary steps", "before exact steps",
              f"20 of {BATCH} rows", f"20 of {LARGER} rows",
              f"{STEPS} ordinary steps and 20 of {LARGER} rows", "recovery beside it"]  # fmt: skip
    goals = []
    if len(lines) == len(TEXTS):
        names = (f"{ALL_STEPS} ordinary steps", "such steps")
        for control, shares in zip(names, zip(*recoveries, strict=True), strict=True):
            value = round(mean(shares), 3)
            name = f"mean recovery with exact steps of {LARGER} rows, beside {control}"
            goals.append(goal(name, f"at least {GOAL}", value, value >= GOAL))
    text = f"Losses of the base, and recovery in brackets, beside {ALL_STEPS} ordinary steps:\n\n"
    write_results("batches", "make bench-batches", rows, goals, text + markdown(header, lines))


def main() -> None:
    ROOT.mkdir(parents=True, exist_ok=True)
    results = RESULTS / "batches.json"

    def known() -> list[dict[str, Any]]:
        return json.loads(results.read_text())["rows"] if results.exists() else []

    for task in sys.argv[1:] or TEXTS:
        for kind, memory in WAYS:
            values = {"task": task, "kind": kind, "memory": memory, "seed": 0, "steps": STEPS, "learning_rate": RATE}
            if not any(values.items() <= row.items() for row in known()):
                new = in_process(measure, values)
                report([*known(), new])  # read again: another process may measure another task
    report(known())


if __name__ == "__main__":
    main()
