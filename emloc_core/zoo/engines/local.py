"""The engine of this machine: as many workers side by side as the memory plan says fit."""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from emloc_core.memory.budget import Budget
from emloc_core.processes.group import within_group
from emloc_core.units import human_bytes
from emloc_core.zoo.engines.engine import WORKER, RefusedError, Worker
from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.jobs.task import Task


@dataclass(frozen=True)
class LocalHandle:
    """A worker of this machine, and the GPU that it has."""

    task: Task
    worker: Worker
    gpu: str | None


class LocalEngine:
    """Workers as processes.

    If the plan cannot tell what a job needs, or its memory ran out once, it runs alone. If there are GPUs, every job
    has its own.

    Args:
        memory: bytes for all of them together; by default :func:`machine_memory`.
        inherited: file descriptors that workers keep open as long as they live.
    """

    #: What runs a worker; measurements and tests of the driver replace it.
    command: Sequence[str] = WORKER

    def __init__(self, workers: int, memory: int | None = None, inherited: Sequence[int] = ()) -> None:
        self.workers, self.memory, self._inherited = workers, memory or machine_memory(), tuple(inherited)
        self._running: list[LocalHandle] = []
        self._gpus = visible_gpus()

    def has_room(self, task: Task) -> bool:
        """Return whether a task can be started now, or has to wait.

        Raises:
            RefusedError: the task needs more memory than all workers may use.
        """
        need = task.needs.memory
        if need is not None and need > self.memory:
            raise RefusedError(
                "out of memory",
                f"{task.job.name} needs {human_bytes(need)} of memory by the plan, but there is only "
                f"{human_bytes(self.memory)}.",
                "Raise --memory if there is more, or make the job smaller: fewer samples, shorter rows.",
            )
        if len(self._running) >= min(self.workers, len(self._gpus) or self.workers):
            return False
        used = [handle.task.needs.memory for handle in self._running]
        if need is None or None in used:
            return not used
        return need + sum(memory for memory in used if memory is not None) <= self.memory

    def start(self, task: Task, directory: Path) -> LocalHandle:
        """Start a worker; what it prints goes to the task's log."""
        outputs = task.lay_out(directory)
        busy = {handle.gpu for handle in self._running}
        gpu = next((name for name in self._gpus if name not in busy), None)
        variables = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        worker = Worker(task.job, outputs, directory / task.log, self._inherited, variables, self.command)
        handle = LocalHandle(task, worker, gpu)
        self._running.append(handle)
        return handle

    def is_under_way(self, handle: LocalHandle) -> bool:  # noqa: ARG002 - of an engine
        """Say that it is: everything is here."""
        return True

    def poll(self, handle: LocalHandle) -> Outcome | None:
        """Return how a worker ended, or None while it runs."""
        outcome = handle.worker.outcome()
        if outcome is None:
            return None
        self.stop(handle)  # and what it left running
        code = handle.worker.process.returncode
        if code < 0 and outcome.cause is None:  # killed after its outcome, before its end: the outputs are complete
            outcome = replace(outcome, message=f"The worker was killed by signal {-code} after it had finished.")
        return replace(outcome, host=socket.gethostname())

    def stop(self, handle: LocalHandle) -> None:
        """Kill a worker and all that it started."""
        self._running.remove(handle)
        handle.worker.end()

    def close(self) -> None:
        """Kill all workers."""
        for handle in list(self._running):
            self.stop(handle)


def machine_memory() -> int:
    """Return the memory in bytes of the machine, or of this control group if that is less; minus a headroom."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Budget.parse(str(within_group(total, total)[1])).usable


def processors() -> int:
    """Return how many processors this process may use: a batch system gives a job only some of the machine's."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, as CUDA numbers them; without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
