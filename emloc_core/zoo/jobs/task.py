"""A job that is about to start: its memory and processors, and the paths of its outputs and its log."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from emloc_core.files.output import HASHES
from emloc_core.zoo.jobs.job import ZooJob

JOBS, LOGS, JOB = "jobs", "logs", "job.json"


@dataclass(frozen=True)
class Demand:
    """What a job needs according to the plan, in bytes; None where the plan could not tell.

    ``base`` and ``emulator`` are the weights; ``inference`` (on the base) and ``tuning`` (the emulator) are peaks.

    Attributes:
        memory: the largest stage's peak on the CPU.
        disk: what the job writes and downloads.
        reason: why something is unknown.
    """

    memory: int | None = None
    disk: int | None = None
    base: int | None = None
    emulator: int | None = None
    inference: int | None = None
    tuning: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Task:
    """A job that is to be started: as it is this time (perhaps made smaller), and what it needs."""

    job: ZooJob
    attempt: int
    needs: Demand

    def directory(self, zoo: Path) -> Path:
        """Return where the outputs go."""
        return zoo / JOBS / self.job.name

    def lay_out(self, zoo: Path) -> Path:
        """Make that directory, with the job file; return its absolute path.

        It gets the hashes from planning, so that the stages need not read the model's weights for them again.
        """
        path = self.directory(zoo).absolute()
        write_job(self.job, path)
        if (zoo / HASHES).is_file() and not (path / HASHES).exists():
            shutil.copyfile(zoo / HASHES, path / HASHES)
        return path

    @property
    def log(self) -> str:
        """The log's path in the zoo."""
        return f"{LOGS}/{self.job.name}.{self.attempt}.log"


def write_job(job: ZooJob, directory: Path) -> None:
    """Make the directory of a job's outputs, and write the job file there."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / JOB).write_text(job.model_dump_json(indent=2) + "\n", encoding="utf-8")
