"""The driver's loop: starts the jobs that fit, records how they ended, and retries where that may help.

One job's failure never stops another. The store always holds what has happened, so a driver may be killed at any moment
and the next one resumes.
"""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emloc_core.files.workspace import Workspace
from emloc_core.units import human_bytes, human_seconds
from emloc_core.zoo.engines.engine import Engine, RefusedError
from emloc_core.zoo.jobs.faults import classify, describe
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.jobs.task import JOBS, Demand, Task
from emloc_core.zoo.retry import Limits, Retry, after
from emloc_core.zoo.state.record import JobRecord
from emloc_core.zoo.state.store import Store

#: Free space that is left on the disk, for the store, the logs, and whoever else writes there.
RESERVE = 64 << 20
_STOP = (signal.SIGINT, signal.SIGTERM)
_SHORTEST, _LONGEST = 0.005, 0.25  # seconds between looks


@dataclass
class _Progress:
    """A job that is not finished."""

    job: ZooJob
    needs: Demand
    attempts: int
    failures: int = 0
    not_before: float = 0.0


Event = Callable[[str, str, str], None]


class Driver:
    """Converts the waiting jobs of a store on an engine.

    Args:
        store: the jobs; the caller holds the zoo's lock.
        tell: called with a job's name, its new state (``running``, ``done``, ``waiting``, ``failed``) and a message.
        stamps: sizes and times of each job's files when it was planned, by the job's name; see :meth:`ZooJob.stamps`.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        limits: Limits | None = None,
        tell: Event = lambda *_: None,
        stamps: Mapping[str, Mapping[str, tuple[int, int]]] | None = None,
    ) -> None:
        self.store, self.engine, self.limits, self.tell = store, engine, limits or Limits(), tell
        self._stamps = stamps or {}
        self._waiting = {record.job.name: _progress(record) for record in store.records() if record.state == "waiting"}
        self._running: dict[str, tuple[_Progress, Any, float]] = {}

    def run(self) -> None:
        """Work until no job waits or runs. However it ends, no worker is left.

        Raises:
            KeyboardInterrupt: it was told to stop, and the signal is raised again; what ran waits for the next driver.
        """
        pause = _SHORTEST
        with _stop_signals() as stop:
            try:
                while self._waiting or self._running:
                    if stop:
                        raise KeyboardInterrupt
                    changed = self._collect()
                    changed = self._start() or changed
                    pause = _SHORTEST if changed else min(pause * 1.5, _LONGEST)
                    if self._running or self._waiting:
                        time.sleep(pause)
            except BaseException:
                self.engine.close()
                for name, (progress, _, started) in self._running.items():
                    outcome = Outcome("interrupted", "The driver was stopped while it ran.")
                    self.store.finish(name, progress.attempts, time.monotonic() - started, outcome, again=True)
                raise
            self.engine.close()

    def _start(self) -> bool:
        """Start whatever can be started now, in order; say whether anything was started."""
        now, started = time.monotonic(), False
        for name, progress in list(self._waiting.items()):
            if progress.not_before > now:
                continue
            task = Task(progress.job, progress.attempts + 1, progress.needs)
            try:
                if not self.engine.has_room(task) or not self._has_disk(task):  # the cheap question first: many wait
                    continue
                self._require_planned(progress.job)
            except RefusedError as error:
                self._begin(name, progress, task)
                self._end(name, progress, Outcome(error.cause, str(error)), 0.0, final=True)
                started = True
                continue
            self._begin(name, progress, task)
            try:
                handle = self.engine.start(task, self.store.directory)
            except Exception as error:
                self._end(name, progress, Outcome(classify(error), describe(error)), 0.0)
            else:
                self._running[name] = progress, handle, time.monotonic()
            started = True
        return started

    def _begin(self, name: str, progress: _Progress, task: Task) -> None:
        progress.attempts += 1
        del self._waiting[name]
        self.store.start(name, progress.attempts, task.log)
        self.tell(name, "running", "")

    def _collect(self) -> bool:
        """Record what has ended, and end what has run too long; say whether there was anything."""
        ended, beside = False, len(self._running) > 1
        for name, (progress, handle, started) in list(self._running.items()):
            if not self.engine.is_under_way(handle):
                self._running[name] = progress, handle, time.monotonic()
                continue
            seconds = time.monotonic() - started
            outcome = self.engine.poll(handle)
            if outcome is None and self.limits.time is not None and seconds > self.limits.time:
                self.engine.stop(handle)
                outcome = Outcome("time limit", f"Stopped at the time limit of {human_seconds(self.limits.time)}.")
            if outcome is not None:
                del self._running[name]
                self._end(name, progress, outcome, seconds, beside=beside)
                ended = True
        return ended

    def _end(
        self,
        name: str,
        progress: _Progress,
        outcome: Outcome,
        seconds: float,
        *,
        beside: bool = False,
        final: bool = False,
    ) -> None:
        """Record how an attempt ended, and queue the job again if that may help; ``beside``: others ran as well."""
        if outcome.cause is None:
            self.store.finish(name, progress.attempts, seconds, outcome)
            self.tell(name, "done", outcome.message)
            return
        shared = beside and progress.needs.memory is not None
        retry = Retry(False) if final else after(outcome, progress.job, progress.failures, self.limits, shared=shared)
        outcome = replace(outcome, message=f"{outcome.message} {retry.note}".strip())
        task = Task(progress.job, progress.attempts, progress.needs)
        if retry.smaller:
            # The smaller job cannot resume what the larger one left.
            with suppress(OSError):
                Workspace(task.directory(self.store.directory) / outcome.stage).discard()
            progress.job = retry.smaller
        if outcome.cause == "out of memory":  # the plan was wrong, or other jobs took too much: now it runs alone
            progress.needs = replace(progress.needs, memory=None)
            self.store.plan({name: progress.needs})
        log = self.store.directory / task.log
        if not log.exists():  # no worker was started
            with suppress(OSError):
                log.parent.mkdir(exist_ok=True)
                log.write_text(f"emloc: error: {outcome.message}\n", encoding="utf-8")
        self.store.finish(name, progress.attempts, seconds, outcome, again=retry.again, smaller=retry.smaller)
        if retry.again:
            progress.failures += 1
            progress.not_before = time.monotonic() + retry.delay
            self._waiting[name] = progress
        self.tell(name, "waiting" if retry.again else "failed", f"{outcome.cause}: {outcome.message}")

    def _require_planned(self, job: ZooJob) -> None:
        """Refuse a job whose files have changed while it waited: it would be recorded as made from the old ones."""
        if job.name not in self._stamps:
            return
        then, now = self._stamps[job.name], job.stamps()
        if changed := sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
            raise RefusedError(
                "bad input",
                f"{changed[0]} was changed after {job.name} was planned.",
                "Restore it and run the same command again, or convert it into another zoo.",
            )

    def _has_disk(self, task: Task) -> bool:
        """Say whether the disk has room for what the task writes, besides what others are still writing.

        Raises:
            RefusedError: it has not, and nothing is running that could free any.
        """
        if self.limits.elsewhere:
            return True
        promised = sum((progress.needs.disk or 0) for progress, _, _ in self._running.values())
        free, need = free_bytes(self.store.directory), remaining_bytes(self.store.directory, task.job.name, task.needs)
        if free - promised >= need + RESERVE:
            return True
        if promised:
            return False
        raise RefusedError(
            "disk",
            f"{task.job.name} would write {human_bytes(need)}, but only {human_bytes(free)} are free, of which "
            f"{human_bytes(RESERVE)} are kept in reserve.",
            "Free some space and run the same command again.",
        )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list that is empty until a signal says stop. So the driver stops between steps, never within one."""
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda number, _: stop.append(number)) for number in _STOP}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stop:  # whoever is interrupted tells by which signal
            signal.raise_signal(stop[0])


def free_bytes(directory: Path) -> int:
    """Return the free bytes of the disk that a directory is, or will be, on."""
    path = directory.absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.is_dir())).free


def remaining_bytes(zoo: Path, name: str, needs: Demand) -> int:
    """Return how many bytes a job that is not running still has to write, according to the plan."""
    return max(0, (needs.disk or 0) - _size(zoo / JOBS / name))


def _size(directory: Path) -> int:
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # a worker of another driver has just renamed it
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def _progress(record: JobRecord) -> _Progress:
    return _Progress(record.job, record.needs or Demand(), len(record.attempts))
