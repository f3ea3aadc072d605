"""The engine's contract: it starts a job's worker somewhere and reports how it ended. The driver decides the rest.

Every engine runs the same command, ``python -m emloc_core.zoo.engines.worker JOB.json``, as a :class:`Worker`. The
outputs appear beside ``JOB.json``, as does the :class:`Outcome`.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any, Protocol

from emloc_core.errors import EmlocError
from emloc_core.processes.environment import VARIABLES
from emloc_core.processes.lifetime import child_environment
from emloc_core.zoo.jobs.faults import ended, memory_kills
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.outcome import OUTCOME, Cause, Outcome, read_outcome
from emloc_core.zoo.jobs.task import JOB, Task

WORKER = (sys.executable, "-m", "emloc_core.zoo.engines.worker")


class RefusedError(EmlocError):
    """A task must not be started, now or later; ``cause`` is the cause of its failure."""

    def __init__(self, cause: Cause, message: str, fix: str) -> None:
        super().__init__(message, fix)
        self.cause = cause


class Engine(Protocol):
    """Starts workers. Each method returns at once."""

    def has_room(self, task: Task) -> bool:
        """Return whether a task can be started now, or has to wait.

        Raises:
            RefusedError: it will never fit, and why.
        """

    def start(self, task: Task, directory: Path) -> Any:
        """Start a worker, with outputs, job file, and log in the zoo's ``directory``; return its handle."""

    def is_under_way(self, handle: Any) -> bool:
        """Say whether its inputs are there; until then it does not work, and its time does not count."""

    def poll(self, handle: Any) -> Outcome | None:
        """Return how it ended, or None while it runs."""

    def stop(self, handle: Any) -> None:
        """End the worker and all that it started; :meth:`poll` is not called again."""

    def close(self) -> None:
        """End all workers, and release what the engine holds."""


class Worker:
    """A worker's process, the leader of its own group.

    Args:
        directory: absolute path of the directory with the job file.
        inherited: file descriptors that it keeps open as long as it lives.
        variables: environment variables besides those of :func:`environment`.
        command: the path of the job file is appended to it.
    """

    def __init__(
        self,
        job: ZooJob,
        directory: Path,
        log: Path,
        inherited: Sequence[int],
        variables: Mapping[str, str] | None = None,
        command: Sequence[str] = WORKER,
    ) -> None:
        self.directory, self._kills = directory, memory_kills()
        (directory / OUTCOME).unlink(missing_ok=True)
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output:
            self.process = Popen(
                [*command, str(directory / JOB)],
                stdin=DEVNULL,
                stdout=output,
                stderr=STDOUT,
                cwd=directory,  # an id of the hub is no path here
                env={**environment(job), **(variables or {})},
                start_new_session=True,
                pass_fds=inherited,
            )

    def outcome(self) -> Outcome | None:
        """Return how it ended, or None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return read_outcome(self.directory) or ended(code, self._kills, "The worker")

    def end(self) -> None:
        """Kill what is left of it and of all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def environment(job: ZooJob, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return a worker's environment, for the process that starts it: threads as the job says, no network if offline."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(job.threads))
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1") if job.offline else {}
    return child_environment({**VARIABLES, **base, **threads, **offline})
