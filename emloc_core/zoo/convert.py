"""Converts a zoo: takes over from a stopped driver, plans new jobs, and runs everything to the end."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from emloc_core.errors import EmlocError
from emloc_core.files.job import Progress
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.output import require_directory
from emloc_core.units import human_bytes
from emloc_core.zoo.driver import RESERVE, Driver, Event, free_bytes, remaining_bytes
from emloc_core.zoo.engines.engine import Engine
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.outcome import OUTCOME
from emloc_core.zoo.jobs.planning import plan
from emloc_core.zoo.jobs.task import JOBS, Demand
from emloc_core.zoo.retry import Limits
from emloc_core.zoo.state.lock import driving
from emloc_core.zoo.state.record import JobRecord
from emloc_core.zoo.state.store import DATABASE, Store

#: What happens to an unfinished job that has changed.
CHANGED = "its files or settings have changed, so its earlier output is removed"


def convert(
    jobs: Sequence[ZooJob],
    directory: Path,
    make_engine: Callable[[int], Engine],
    limits: Limits | None = None,
    tell: Event = lambda *_: None,
    advance: Progress = lambda *_: None,
) -> list[JobRecord]:
    """Do the jobs, and those that an earlier run has left in the zoo; return the records of all.

    Args:
        make_engine: called with the lock's file descriptor, for the workers of this machine to hold.

    Raises:
        EmlocError: another driver is at work there, a finished job already has the name of a new one, or the directory
            cannot be made or is one of the models.
    """
    _require_place(jobs, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EmlocError(f"{directory} cannot be made ({error.strerror}).", "Choose another place with -o.") from error
    with driving(directory) as lock, closing(Store(directory, create=True)) as store:
        store.take_over()
        stamps = {job.name: job.stamps() for job in jobs}  # before they are hashed
        for name in _add(store, jobs, directory, advance):
            tell(name, "changed", CHANGED)
        Driver(store, make_engine(lock), limits, tell, stamps).run()
        return store.records()


@dataclass(frozen=True)
class Preview:
    """What a conversion would do with a job.

    Attributes:
        state: ``to do``, ``done``, or ``the same as NAME``.
        needs: by the plan.
        note: anything else it would do.
    """

    job: ZooJob
    state: str
    needs: Demand
    note: str = ""

    @property
    def name(self) -> str:
        """The job's name in the zoo."""
        return self.job.name


def preview(jobs: Sequence[ZooJob], directory: Path, advance: Progress = lambda *_: None) -> list[Preview]:
    """Return what converting the jobs would do, in order, and then those that wait in the zoo; nothing is made.

    Raises:
        EmlocError: a finished job already has the name of a new one, or the directory cannot be made or is one of the
            models.
    """
    _require_place(jobs, directory)
    with tempfile.TemporaryDirectory() as temporary, closing(Store(Path(temporary), create=True)) as store:
        if (directory / DATABASE).is_file():
            with closing(Store(directory)) as existing:
                existing.copy_to(store)
        changed = _add(store, jobs, directory if directory.is_dir() else Path(temporary), advance)
        records = {record.job.name: record for record in store.records()}
    previews = []
    left_over = [name for name, record in records.items() if record.state in ("waiting", "interrupted")]
    for name in dict.fromkeys([*(job.name for job in jobs), *left_over]):
        record = records[name]
        needs = record.needs or Demand()
        state = "done" if record.state == "done" else "to do"
        state = f"the same as {record.duplicate_of}" if record.duplicate_of else state
        previews.append(Preview(record.job, state, needs, CHANGED if name in changed else ""))
    return previews


def _require_place(jobs: Sequence[ZooJob], directory: Path) -> None:
    require_directory(directory)
    if any(Path(job.model).is_absolute() and Path(job.model).resolve() == directory.resolve() for job in jobs):
        raise EmlocError(f"{directory} is the directory of a model.", "Choose another place with -o.", code="exists")


def require_room(previews: Sequence[Preview], directory: Path, limits: Limits) -> tuple[int, int | None]:
    """Return how many bytes will be written, and how many may be; None where that is unknown.

    Raises:
        EmlocError: the disk does not hold it.
    """
    needed = sum(remaining_bytes(directory, job.name, job.needs) for job in previews if job.state == "to do")
    if limits.elsewhere:
        return needed, None
    room = max(0, free_bytes(directory) - RESERVE)
    if needed > room:
        raise EmlocError(
            f"The jobs would write {human_bytes(needed)}, but {directory} has room for only {human_bytes(room)}.",
            "Free some space, choose another disk, or convert fewer models at a time.",
        )
    return needed, room


def _add(store: Store, jobs: Sequence[ZooJob], directory: Path, advance: Progress) -> list[str]:
    """Plan jobs and add them to a store; those whose outputs are gone from ``directory`` wait again.

    Return the names of those that have changed.
    """
    records = store.records()
    demands = {record.fingerprint: record.needs for record in records if record.needs and not record.needs.reason}
    planned = plan(jobs, directory, demands, advance)
    fingerprints = [fingerprint for fingerprint, _ in planned]
    requested = {*fingerprints, *(job.name for job in jobs)}
    relevant = [record for record in records if requested & {record.job.name, record.fingerprint}]
    store.reopen([record.job.name for record in relevant if _is_gone(record, directory)])
    changed = store.add(jobs, fingerprints)
    store.plan(
        {job.name: needs or demands[fingerprint] for job, (fingerprint, needs) in zip(jobs, planned, strict=True)}
    )
    return changed


def _is_gone(record: JobRecord, zoo: Path) -> bool:
    """Say whether a job is done and its outputs are no longer in the zoo.

    If they never were, but are in a cluster's storage, its worker left no outcome in the zoo either.
    """
    path = zoo / JOBS / record.job.name
    if record.state != "done":
        return False
    complete = all((stage.output / MANIFEST).is_file() for stage in record.job.stages(path))
    return not complete and ((path / OUTCOME).is_file() or not path.is_dir())
