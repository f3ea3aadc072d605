"""Estimates how long a job will take from finished jobs of the same zoo."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.task import Demand
from emloc_core.zoo.state.record import JobRecord


def estimate(job: ZooJob, needs: Demand, records: Sequence[JobRecord]) -> float | None:
    """Return the seconds that a job will take, or None where a stage of it has never been finished in this zoo.

    A stage's time is taken to grow with the base's bytes: the median of seconds a byte, of the finished jobs, times
    this job's bytes.
    """
    if needs.base is None:
        return None
    total = 0.0
    for stage in job.stages(Path()):
        rates = [
            record.result["stages"][stage.name]["seconds"] / record.result["bytes"]["base"]
            for record in records
            if record.state == "done" and stage.name in record.result.get("stages", {})
        ]
        if not rates:
            return None
        total += median(rates) * needs.base
    return total
