"""The engine of a Ray cluster: every job is a task that asks for the processors, GPUs and memory of its plan.

Ray decides where tasks run. It tries nothing again by itself: attempts are the driver's, and are in the zoo's store.
"""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.files.manifest import MANIFEST
from emloc_core.units import human_bytes
from emloc_core.zoo.engines.connect import connect
from emloc_core.zoo.engines.engine import RefusedError
from emloc_core.zoo.engines.node import Order, output_names, perform
from emloc_core.zoo.engines.storage import Storage, input_name, share
from emloc_core.zoo.jobs.faults import classify, describe
from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.jobs.task import JOBS, Task

_FRESH = 1.0  # seconds before the nodes are queried again: every waiting job asks, at every look
_CPU, _GPU, _MEMORY = "CPU", "GPU", "memory"
Resources = dict[str, float]


@dataclass(frozen=True)
class RayHandle:
    """A task of the cluster.

    Attributes:
        resources: what it asks for, by Ray's names.
        inputs: names in the storage of what the job reads, by path; empty without one.
        submitted: gives Ray's reference, once the inputs are in the storage, if there is one.
    """

    task: Task
    directory: Path
    resources: Resources
    inputs: dict[str, str]
    submitted: "Future[Any]"


class RayEngine:
    """Workers on the nodes of a Ray cluster.

    Args:
        workers: maximum number at a time; by default as many as the cluster has room for.
        memory: bytes for all of them together; by default what the nodes have.
        address: a cluster: ``HOST:PORT``, ``ray://HOST:PORT``, or ``auto`` for the one that this machine is in. None
            starts one on this machine, which ends with the engine.
        storage: URL where inputs and outputs are shared; None for the zoo itself, on a disk that all nodes share.

    Raises:
        EmlocError: Ray is missing, or there is no such cluster or storage.
    """

    def __init__(
        self,
        workers: int | None = None,
        memory: int | None = None,
        address: str | None = None,
        storage: str | None = None,
    ) -> None:
        if storage and "://" not in storage:  # a path; workers have another working directory
            storage = str(Path(storage).absolute())
        self.workers, self.memory, self.url = workers, memory, storage
        self._storage = Storage(storage) if storage else None
        self._running: list[RayHandle] = []
        self._node_resources: list[Resources] = []
        self._unused: Resources = {}
        self._refreshed_at = -math.inf
        self._ray = connect(address, memory)
        self._perform = self._ray.remote(perform)
        # One at a time: what is shared by two jobs is copied to the storage once.
        self._submissions = ThreadPoolExecutor(1)

    def has_room(self, task: Task) -> bool:
        """Return whether the cluster has room for a task, in all of its nodes together.

        If no single node has the room, the task waits in Ray's queue.

        Raises:
            RefusedError: no node has what the task asks for.
        """
        nodes = self._nodes()
        resources = self._ask(task, nodes)
        fits = any(_fits(resources, node) for node in nodes)
        if not fits or (self.memory is not None and resources[_MEMORY] > self.memory):
            needs = ", ".join(_describe(name, amount) for name, amount in resources.items() if amount)
            without = {**resources, _MEMORY: 0}
            raise RefusedError(
                "out of memory" if any(_fits(without, node) for node in nodes) else "bad input",
                f"{task.job.name} needs {needs}, which no node of the cluster has.",
                "Add such a node, or make the job smaller: fewer threads, fewer samples, shorter rows.",
            )
        total = {name: sum(node.get(name, 0) for node in nodes) for name in resources}
        if self.memory is not None:
            total[_MEMORY] = min(total[_MEMORY], self.memory)
        free = {
            name: amount - sum(handle.resources[name] for handle in self._running) for name, amount in total.items()
        }
        if self._unused:  # others use the cluster too
            free = {name: min(amount, self._unused.get(name, 0)) for name, amount in free.items()}
        return _fits(resources, free) and (self.workers is None or len(self._running) < self.workers)

    def start(self, task: Task, directory: Path) -> RayHandle:
        """Submit a task."""
        task.lay_out(directory)
        (directory / task.log).parent.mkdir(exist_ok=True)
        resources = self._ask(task, self._nodes())
        inputs: dict[str, str] = {}
        if self._storage is not None:
            job = task.job
            names = filter(None, (job.model, job.data, *job.test))
            # An id of the hub is no path in this working directory.
            paths = {name: Path(name) for name in names if Path(name).is_absolute()}
            inputs = {name: input_name(path) for name, path in paths.items() if path.exists()}
        submitted = self._submissions.submit(self._submit, task, directory, resources, inputs)
        handle = RayHandle(task, directory, resources, inputs, submitted)
        self._running.append(handle)
        self._promise(resources)
        return handle

    def is_under_way(self, handle: RayHandle) -> bool:
        """Say whether its inputs are in the storage, which are copied task by task, and Ray has it."""
        return handle.submitted.done()

    def poll(self, handle: RayHandle) -> Outcome | None:
        """Return how a task ended, or None while it waits or runs."""
        if not self.is_under_way(handle):
            return None
        try:
            reference = handle.submitted.result()
            if not self._ray.wait([reference], timeout=0)[0]:
                return None
            outcome = self._verified(Outcome(**self._ray.get(reference)), handle)
        except Exception as error:
            outcome = self._failure(error, handle)
        self._running.remove(handle)
        self._fetch_log(handle)
        return outcome

    def stop(self, handle: RayHandle) -> None:
        """End a task; its worker ends with it."""
        self._running.remove(handle)
        if not handle.submitted.cancel():  # an upload that is under way ends first; only close() waits for it
            handle.submitted.add_done_callback(self._end)
        self._fetch_log(handle)

    def _end(self, submitted: Future[Any]) -> None:
        with suppress(Exception):  # it could not be submitted, or has ended
            self._ray.cancel(submitted.result(), force=True)

    def close(self) -> None:
        """End all tasks, and leave the cluster, which ends if it was started here."""
        for handle in list(self._running):
            self.stop(handle)
        self._submissions.shutdown(cancel_futures=True)
        self._ray.shutdown()

    def _submit(self, task: Task, directory: Path, resources: Resources, inputs: dict[str, str]) -> Any:
        if self._storage is not None:
            for path in inputs:
                share(self._storage, Path(path))
        order = Order(task.job.model_dump_json(), str(directory.absolute()), task.log, self.url, inputs)
        options = {"num_cpus": resources[_CPU], "num_gpus": resources[_GPU], "memory": int(resources[_MEMORY]) or None}
        return self._perform.options(name=task.job.name, max_retries=0, **options).remote(order)

    def _nodes(self) -> list[Resources]:
        """Return what each node has in all; also refresh what nobody uses."""
        if time.monotonic() - self._refreshed_at > _FRESH:
            self._node_resources = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._unused = {}
            with suppress(Exception):  # then only this zoo's tasks count
                self._unused = dict(self._ray.available_resources())
            for handle in self._running:
                if not handle.submitted.done():  # its inputs are on their way
                    self._promise(handle.resources)
            self._refreshed_at = time.monotonic()
        return self._node_resources

    def _promise(self, resources: Resources) -> None:
        """Subtract what a task asks for, and Ray has not given it yet, from what nobody uses."""
        if self._unused:
            self._unused.update({name: self._unused.get(name, 0) - amount for name, amount in resources.items()})

    def _ask(self, task: Task, nodes: list[Resources]) -> Resources:
        """Return what a task asks for: a GPU if there are any; all memory of a node if its need is not known."""
        resources: Resources = {_CPU: task.job.threads, _GPU: float(any(node.get(_GPU) for node in nodes))}
        need = task.needs.memory
        if need is None:
            need = int(min((node.get(_MEMORY, 0) for node in nodes if _fits(resources, node)), default=0))
            need = need if self.memory is None else min(need, self.memory)
        return {**resources, _MEMORY: need}

    def _failure(self, error: Exception, handle: RayHandle) -> Outcome:
        """Return the outcome of a task for which Ray raised an error."""
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.OutOfMemoryError):
            stages = handle.task.job.stages(handle.task.directory(handle.directory))
            stage = next((stage.name for stage in stages if stage.state != "there"), "")
            return Outcome("out of memory", "The node ran out of memory, and Ray ended the worker.", stage)
        if isinstance(error, exceptions.RayTaskError):
            cause = error.cause if isinstance(error.cause, Exception) else error
            return Outcome(classify(cause), describe(cause))
        if isinstance(error, exceptions.RayError):
            return Outcome("lost worker", f"The worker or its node was lost ({type(error).__name__}).")
        return Outcome(classify(error), describe(error))

    def _fetch_log(self, handle: RayHandle) -> None:
        """Copy the log from the storage to the zoo."""
        if self._storage is not None:
            with suppress(OSError):
                (handle.directory / handle.task.log).write_bytes(self._storage.read(handle.task.log))

    def _verified(self, outcome: Outcome, handle: RayHandle) -> Outcome:
        """Return the outcome; a failure if it is a success whose outputs are not visible here."""
        if outcome.cause is not None:
            return outcome
        job = handle.task.job
        for stage, name in output_names(job, handle.inputs).items():
            output = name if self._storage else f"{JOBS}/{job.name}/{stage}"
            visible = self._storage.has(output) if self._storage else (handle.directory / output / MANIFEST).is_file()
            if not visible:
                message = (
                    f"{outcome.host} made {output}, which is not visible at {self.url or handle.directory} from here."
                )
                return Outcome("input/output", message, stage, host=outcome.host)
        return outcome


def _fits(requested: Resources, available: Resources) -> bool:
    return all(available.get(name, 0) >= amount for name, amount in requested.items() if amount)


def _describe(name: str, amount: float) -> str:
    if name == _MEMORY:
        return f"{human_bytes(amount)} of memory"
    return f"{amount:g} {'processors' if name == _CPU else 'GPUs'}"
