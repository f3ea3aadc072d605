"""The best learning rate for exact steps, with and without the moments of tuning.

Starts are cells of ``quality.py``: an emulator, a LoRA tuned on it, carried over to the base. From there 20 exact steps
are taken at shares of tuning's learning rate, which is the best of several. The loss is as in ``quality.py``, on the
same test rows.

About half an hour. Every start is added to ``results/rates.json`` as soon as it is measured, and not repeated.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import RESULTS, goal, in_process, markdown, write_results
from quality import Metered, Scores, base_of, corrected, digest, tuned, write_rows
from quality_cells import PICTURES, Cell
from quality_stages import polished

ROOT = Path("build/quality")
STARTS = (
    Cell(PICTURES, "nf4", 0.28, 0, 60, 8e-3),
    Cell("arithmetic", "nf4-plain", 0.28, 0, 60, 2e-3),
    Cell("classification", "nf4-plain", 0.28, 0, 60, 2e-3),
)
STEPS, SHARES = 20, (2, 1, 1 / 2, 1 / 4, 1 / 8)
WITH, WITHOUT = "with moments", "without"


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Measure a start; called in a process of its own."""
    from emloc_core.adapters.moments import FILE

    cell = Cell(**values)
    directory = ROOT / f"rates-{cell.name}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    rows, base = write_rows(directory, cell, ROOT), base_of(cell.model, cell.task, ROOT)
    _, _, adapter = tuned(base, directory, cell, rows, Metered())
    start = corrected(adapter, base, rows, "auto", directory / "start")
    fresh = Path(shutil.copytree(start, directory / "fresh"))
    (fresh / FILE).unlink()
    scores, losses = Scores(base, rows["test"]), {}
    for name, initial in ((WITH, start), (WITHOUT, fresh)):
        for share in SHARES:
            output = directory / f"{initial.name}-{share:g}"
            polished(initial, base, rows, STEPS, share * cell.learning_rate, cell.seed, output)
            losses[f"{name}, {share:g}"] = scores.measure(output)["nll"]
    row = {**values, "base": digest(base), "start": scores.measure(start)["nll"], "losses": losses}
    shutil.rmtree(directory)
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """Write what was measured so far."""
    shares = [f"{share:g}" for share in SHARES]
    table = markdown(
        ["start", "tuned at", "before", "exact steps", *shares],
        [
            [f"{row['task']}, `{row['kind']}`", f"{row['learning_rate']:g}", f"{row['start']:.3f}", name]
            + [f"{row['losses'][f'{name}, {share}']:.3f}" for share in shares]
            for row in rows
            for name in (WITH, WITHOUT)
        ],
    )
    worst = max(row["losses"][f"{WITH}, {share:g}"] / row["start"] for row in rows for share in (0.5, 0.25))
    goals = [goal("with moments, at half and a quarter: loss over that before", "below 1", round(worst, 3), worst < 1)]
    write_results("rates", "make bench-rates", rows, goals, table)


def main() -> None:
    ROOT.mkdir(parents=True, exist_ok=True)
    results = RESULTS / "rates.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"] if results.exists() else []
    for cell in STARTS:
        if not any(all(row[name] == value for name, value in asdict(cell).items()) for row in rows):
            rows.append(in_process(measure, asdict(cell)))
            report(rows)
    report(rows)


if __name__ == "__main__":
    main()
