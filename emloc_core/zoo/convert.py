"""Converts a zoo: takes over from a stopped driver, plans new jobs, and runs everything to the end."""

import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from emloc_core.errors import EmlocError
from emloc_core.files.job import Progress
from emloc_core.files.manifest import MANIFEST
from emloc_core.units import human_bytes
from emloc_core.zoo.driver import RESERVE, Driver, Event, free_bytes, left, written
from emloc_core.zoo.engines.engine import Engine
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.outcome import OUTCOME
from emloc_core.zoo.jobs.planning import plan
from emloc_core.zoo.jobs.task import JOBS, Demand
from emloc_core.zoo.retry import Limits
from emloc_core.zoo.state.lock import driving
from emloc_core.zoo.state.record import JobRecord
from emloc_core.zoo.state.store import DATABASE, Store
from emloc_core.zoo.state.timing import estimate

#: What happens to a job that is not done and not what it was.
CHANGED = "its files or settings have changed, so its earlier output is removed"


def convert(
    jobs: Sequence[ZooJob],
    directory: Path,
    make_engine: Callable[[int], Engine],
    limits: Limits | None = None,
    tell: Event = lambda *_: None,
    advance: Progress = lambda *_: None,
) -> list[JobRecord]:
    """Do the jobs, and those that an earlier run has left in the zoo; return what has become of all of them.

    Args:
        make_engine: called with the lock's file descriptor, which workers of this machine are to hold.

    Raises:
        EmlocError: another driver is at work there, or a finished job has the name of another one; or there is no place
            for a zoo.
    """
    _require_place(directory)
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
        seconds: by what finished jobs of this zoo took; None where none tells.
        note: what it does besides.
    """

    job: ZooJob
    state: str
    needs: Demand
    seconds: float | None
    note: str = ""

    @property
    def name(self) -> str:
        """The job's name in the zoo."""
        return self.job.name


def preview(jobs: Sequence[ZooJob], directory: Path, advance: Progress = lambda *_: None) -> list[Preview]:
    """Return what converting the jobs would do, in order, those that wait in the zoo last; nothing is made.

    Raises:
        EmlocError: a finished job has the name of another one; or there is no place for a zoo.
    """
    _require_place(directory)
    with tempfile.TemporaryDirectory() as temporary, closing(Store(Path(temporary), create=True)) as store:
        if (directory / DATABASE).is_file():
            with closing(Store(directory)) as there:
                there.copy_to(store)
        before = store.records()
        changed = _add(store, jobs, directory if directory.is_dir() else Path(temporary), advance)
        records = {record.job.name: record for record in store.records()}
    found = []
    left_over = [name for name, record in records.items() if record.state in ("waiting", "interrupted")]
    for name in dict.fromkeys([*(job.name for job in jobs), *left_over]):
        record = records[name]
        needs = record.needs or Demand()
        state = "done" if record.state == "done" else "to do"
        state = f"the same as {record.duplicate_of}" if record.duplicate_of else state
        seconds = estimate(record.job, needs, before) if state == "to do" else None
        found.append(Preview(record.job, state, needs, seconds, CHANGED if name in changed else ""))
    return found


def require_room(previews: Sequence[Preview], directory: Path, limits: Limits) -> tuple[int, int | None]:
    """Return how many bytes will be written, and how many may be; None where nothing tells.

    Raises:
        EmlocError: the disk, or the limit, does not hold it.
    """
    to_do = {each.job.name: each.needs for each in previews if each.state == "to do"}
    needed = sum(left(directory, name, needs) for name, needs in to_do.items())
    rooms = [] if limits.elsewhere else [free_bytes(directory) - RESERVE]
    if limits.disk is not None:
        begun = sum(needs.disk or 0 for needs in to_do.values()) - needed
        rooms.append(limits.disk - begun - _taken(directory, to_do))
    room = max(0, min(rooms)) if rooms else None
    if room is not None and needed > room:
        raise EmlocError(
            f"The jobs would write {human_bytes(needed)}, but {directory} has room for only {human_bytes(room)}.",
            "Free some space, choose another disk, or convert fewer models at a time.",
        )
    return needed, room


def _taken(zoo: Path, to_do: Collection[str]) -> int:
    """Return how many bytes the finished jobs of a zoo take, but those whose outputs are gone and to be made again."""
    if not (zoo / DATABASE).is_file():
        return 0
    with closing(Store(zoo)) as store:
        done = [each for each in store.records() if each.state == "done" and each.job.name not in to_do]
    return sum(written(zoo, each.job.name, each.needs) for each in done)


def _add(store: Store, jobs: Sequence[ZooJob], directory: Path, advance: Progress) -> list[str]:
    """Plan jobs and add them to a store; those whose outputs are gone from ``directory`` wait again.

    Return the names of those that were others.
    """
    records = store.records()
    known = _known(records)
    planned = plan(jobs, directory, known, advance)
    fingerprints = [fingerprint for fingerprint, _ in planned]
    asked = {*fingerprints, *(job.name for job in jobs)}
    relevant = [each for each in records if asked & {each.job.name, each.fingerprint}]
    store.reopen([each.job.name for each in relevant if _is_gone(each, directory)])
    changed = store.add(jobs, fingerprints)
    store.plan({job.name: needs or known[seen] for job, (seen, needs) in zip(jobs, planned, strict=True)})
    return changed


def _require_place(directory: Path) -> None:
    """Require that a directory is there, or can be where nothing is yet."""
    place = directory.absolute()
    there = next(each for each in (place, *place.parents) if each.exists())
    if not there.is_dir():
        raise EmlocError(f"{there} is not a directory.", "Choose another place with -o.")


def _is_gone(record: JobRecord, zoo: Path) -> bool:
    """Say whether a job is done and its outputs are not in the zoo any more.

    Where they never were, but in the storage of a cluster, its worker left no outcome in the zoo either.
    """
    place = zoo / JOBS / record.job.name
    if record.state != "done":
        return False
    whole = all((stage.output / MANIFEST).is_file() for stage in record.job.stages(place))
    return not whole and ((place / OUTCOME).is_file() or not place.is_dir())


def _known(records: Sequence[JobRecord]) -> dict[str, Demand]:
    return {each.fingerprint: each.needs for each in records if each.needs is not None and not each.needs.reason}
