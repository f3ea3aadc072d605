"""Memory and time of ``compress`` for several kinds of emulator, beside the predictions of ``emloc plan``.

Two blocks at the widths of Llama-3.2-1B with random weights, calibrated on 64 rows of 128 tokens, as in ``scale.py``.
What counts is the peak of a process of its own. The plan is a formula, not a trace: it should not promise less than is
taken. The planned time is a lower bound.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from harness import goal, in_process, markdown, write_results
from scale import LENGTH, prepare

BLOCKS = 2
#: Name -> settings of the emulator.
WAYS: dict[str, dict[str, Any]] = {
    "low-rank": {"kind": "low-rank"},
    "low-rank, propagated": {"kind": "low-rank", "allocator": "uniform", "refine": 0},
    "low-rank, paper": {"kind": "low-rank", "calibration": "base"},
    "nf4": {"kind": "nf4"},
    "2.7-bit": {"kind": "2.7-bit"},
    "1.6-bit+repair": {"kind": "1.6-bit+repair", "ratio": 0.23},
    "low-rank-nf4": {"kind": "low-rank-nf4"},
}


def compress(work: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Make an emulator of ``work``/base; return the seconds of its last block, and of the processors' time."""
    from emloc_core.emulator.compress import Compress
    from emloc_core.requests import CompressRequest
    from emloc_core.settings import CompressSettings

    place = Path(work)
    with tempfile.TemporaryDirectory(dir=place) as output:
        given = {"model": str(place / "base"), "data": str(place / "rows.jsonl"), "device": "cpu"}
        chosen = CompressSettings(**settings)
        job = Compress(CompressRequest(**given, output=Path(output) / "emulator", settings=chosen))
        ends: list[tuple[float, float]] = []
        job.run(lambda *_: ends.append((time.perf_counter(), time.process_time())))
    (started, used), (ended, more) = ends[-2:]
    return {"block_seconds": ended - started, "block_processor_seconds": more - used}


def planned(work: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what ``emloc plan`` says that this takes."""
    from emloc_core.memory import arithmetic, speed, streamed
    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import make_workload
    from emloc_core.settings import CompressSettings, TrainSettings

    config = Path(work) / "base" / "config.json"
    chosen = CompressSettings(**settings)
    model = MemoryModel(config, make_workload(config, TrainSettings(batch_size=1), length=LENGTH), chosen)
    plan = model.plan()
    operations, machine = arithmetic.compress(model, plan), speed.measure("cpu", config.parent)
    assert machine
    return {
        "planned_bytes": streamed.compress(model, plan).total,
        "planned_block_seconds": machine.seconds(operations.own, 0, operations.single) / BLOCKS,
    }


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        in_process(prepare, place, "1B", BLOCKS)
        for name, settings in WAYS.items():
            said = in_process(planned, place, settings)
            measured = in_process(compress, place, settings)
            rows.append({"name": name, "settings": settings, **said, **measured})
    least = min(row["planned_bytes"] / row["peak_rss_bytes"] for row in rows)
    goals = [goal("plan over peak, the least", "at least 0.95", round(least, 3), least >= 0.95)]
    table = markdown(
        ["kind", "peak RSS, GB", "planned, GB", "seconds per block", "of processors", "planned, at least"],
        [
            [
                row["name"],
                f"{row['peak_rss_bytes'] / 1e9:.2f}",
                f"{row['planned_bytes'] / 1e9:.2f}",
                f"{row['block_seconds']:.0f}",
                f"{row['block_processor_seconds']:.0f}",
                f"{row['planned_block_seconds']:.0f}",
            ]
            for row in rows
        ],
    )
    write_results("kinds", "make bench-kinds", rows, goals, table)


if __name__ == "__main__":
    main()
