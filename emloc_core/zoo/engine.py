"""What an engine is: it starts a job's worker somewhere, and says how it ended. The driver decides everything else.

Every engine runs the same command, ``python -m emloc_core.zoo.worker JOB.json``, by :func:`start_worker`; the outputs
and ``result.json``, a JSON :class:`Outcome`, appear beside ``JOB.json``.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from emloc_core.errors import EmlocError
from emloc_core.files.output import HASHES, read_object
from emloc_core.lifetime import child_environment
from emloc_core.zoo.job import Job

Cause = Literal[
    "out of memory", "input/output", "bad input", "time limit", "disk", "crash", "lost worker", "interrupted"
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
JOBS, LOGS, JOB, OUTCOME = "jobs", "logs", "job.json", "result.json"
WORKER = (sys.executable, "-m", "emloc_core.zoo.worker")


@dataclass(frozen=True)
class Needs:
    """What a job needs, by the plan; None where the plan could not tell.

    Attributes:
        memory: the largest stage's peak on the CPU, in bytes.
        disk: what the job writes and downloads, in bytes.
        base: the model's weights, in bytes.
        emulator: the emulator's weights, in bytes.
        inference: the peak of inference on the base, in bytes.
        tuning: the peak of tuning the emulator, in bytes.
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
    """A job that is to be started: as it is this time (smaller than asked for, perhaps), and what it needs."""

    job: Job
    attempt: int
    needs: Needs

    def directory(self, zoo: Path) -> Path:
        """Return where the outputs go."""
        return zoo / JOBS / self.job.name

    def lay_out(self, zoo: Path) -> Path:
        """Make that directory, with the job file; return its absolute path.

        It gets the hashes that planning took: the stages need not read the model's weights for them again.
        """
        place = self.directory(zoo).absolute()
        write_job(self.job, place)
        if (zoo / HASHES).is_file() and not (place / HASHES).exists():
            shutil.copyfile(zoo / HASHES, place / HASHES)
        return place

    @property
    def log(self) -> str:
        """The log's path in the zoo."""
        return f"{LOGS}/{self.job.name}.{self.attempt}.log"


class NoRoomError(EmlocError):
    """A task will never fit; ``cause`` is that of its failure."""

    def __init__(self, cause: Cause, message: str, fix: str) -> None:
        super().__init__(message, fix)
        self.cause = cause


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        cause: of a failure; None is success.
        message: what happened and where, for a person.
        stage: the output that was being made, where known: ``emulator``, ``adapter``, ...
        result: of a success; see :func:`emloc_core.zoo.result.collect`.
        host: where it ran.
    """

    cause: Cause | None
    message: str = ""
    stage: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    host: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


class Engine(Protocol):
    """Starts workers. Each method returns at once."""

    def slots(self, task: Task) -> int:
        """Return how many more tasks like this one can be started now; 0 for wait.

        Raises:
            NoRoomError: it will never fit, and why.
        """

    def start(self, task: Task, directory: Path) -> Any:
        """Start a worker, with outputs, job file, and log in the zoo's ``directory``; return its handle."""

    def poll(self, handle: Any) -> Outcome | None:
        """Return how it ended, or None while it runs."""

    def stop(self, handle: Any) -> None:
        """End the worker and all that it started; :meth:`poll` is not called again."""

    def close(self) -> None:
        """End all workers, and give back what the engine holds."""


def read_outcome(directory: Path) -> Outcome | None:
    """Return what a worker wrote of how it ended; None where it wrote nothing."""
    with contextlib.suppress(EmlocError, TypeError):
        return Outcome(**read_object(directory / OUTCOME))
    return None


def write_job(job: Job, place: Path) -> None:
    """Make the directory of a job's outputs, and write the job file there."""
    place.mkdir(parents=True, exist_ok=True)
    (place / JOB).write_text(job.model_dump_json(indent=2) + "\n", encoding="utf-8")


def start_worker(
    job: Job,
    place: Path,
    log: Path,
    inherited: Sequence[int],
    variables: Mapping[str, str] | None = None,
    command: Sequence[str] = WORKER,
) -> subprocess.Popen[bytes]:
    """Start a worker, the leader of its own group of processes.

    Args:
        job: as in its file.
        place: absolute path of the directory with the job file.
        log: file for what it prints.
        inherited: file descriptors that it holds as long as it lives.
        variables: of the environment, besides those of :func:`environment`.
        command: is given the path of the job file.
    """
    (place / OUTCOME).unlink(missing_ok=True)
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, str(place / JOB)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=place,  # an id of the hub is no path here
            env={**environment(job), **(variables or {})},
            start_new_session=True,
            pass_fds=inherited,
        )


def environment(job: Job, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return a worker's environment, for the process that starts it: threads as the job says, no network if offline."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(job.threads))
    quiet = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000", "TOKENIZERS_PARALLELISM": "false"}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1") if job.offline else {}
    return child_environment({**base, **quiet, **threads, **offline})
