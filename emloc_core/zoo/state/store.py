"""The state of a zoo in one SQLite file: always consistent, readable while the driver writes.

Every change is one transaction, so that a reader, or the next driver after a kill, sees the whole of it or nothing.
Only the driver writes; ``zoo.lock`` says whether there is one.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from emloc_core.errors import DiskFullError, EmlocError
from emloc_core.files.workspace import remove_at_once
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.jobs.task import JOBS, Demand
from emloc_core.zoo.state.lock import is_driven
from emloc_core.zoo.state.record import Attempt, JobRecord, State

DATABASE = "zoo.db"
_PATIENCE = 60.0  # seconds to wait for room on a full disk
_DISK_FAULTS = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}
_MAKE_ROOM = "Its disk is full or read-only: free some space, or make it writable."
_SCHEMA = """
CREATE TABLE jobs (
    name TEXT PRIMARY KEY, position INTEGER NOT NULL, job TEXT NOT NULL, fingerprint TEXT NOT NULL,
    state TEXT NOT NULL, duplicate_of TEXT, needs TEXT, result TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX fingerprints ON jobs (fingerprint);
CREATE TABLE attempts (
    name TEXT NOT NULL REFERENCES jobs, number INTEGER NOT NULL, started REAL NOT NULL, seconds REAL, cause TEXT,
    message TEXT NOT NULL DEFAULT '', log TEXT NOT NULL, host TEXT NOT NULL DEFAULT '', PRIMARY KEY (name, number)
);
"""
_JOBS = "SELECT job, fingerprint, state, duplicate_of, needs, result FROM jobs"
_ATTEMPTS = "SELECT name, number, started, seconds, cause, message, log, host FROM attempts"


class Store:
    """The jobs of the zoo in ``directory``. Not for use by several threads at once.

    Args:
        create: make it if it does not exist; only for the driver.

    Raises:
        EmlocError: there is no zoo, or its file cannot be opened.
    """

    def __init__(self, directory: Path, *, create: bool = False) -> None:
        self.directory = directory
        path = directory / DATABASE
        if not create and not path.is_file():
            raise EmlocError(f"There is no zoo at {directory}.", "Check the path; `emloc zoo convert` makes one.")
        try:
            if create and not path.exists():
                _create(path)
            self._database = _open(path, create=create)
        except (OSError, sqlite3.Error) as error:
            of_disk = isinstance(error, OSError) or _is_of_disk(error)
            remedy = _MAKE_ROOM if of_disk else "Restore it, or choose another zoo."
            raise EmlocError(f"{path} cannot be opened ({error}).", remedy) from error

    def add(self, jobs: Sequence[ZooJob], fingerprints: Sequence[str]) -> list[str]:
        """Add jobs that are not there yet, in order; one with the fingerprint of another job becomes its duplicate.

        A job that is not done and whose model, data or settings have changed is replaced, and what it made is removed;
        a failed one waits again. A duplicate of a job that has changed waits in its place.

        Returns:
            The names of those that were replaced.

        Raises:
            EmlocError: a job of that name is done, and was something else; nothing is added then.
        """
        with self._transaction():
            changed = [
                job.name for job, fingerprint in zip(jobs, fingerprints, strict=True) if self._add(job, fingerprint)
            ]
            self._settle_duplicates()
            # Before it is recorded: after a kill in between, the old job only has to begin again.
            for name in changed:
                if (output := self.directory / JOBS / name).is_dir():
                    remove_at_once(output)
        return changed

    def _add(self, job: ZooJob, fingerprint: str) -> bool:
        """Add a job, and say whether there was another one of that name."""
        row = self._fetch_one("SELECT state, fingerprint, job FROM jobs WHERE name = ?", job.name)
        if row and row[0] == "done":
            if row[1] == fingerprint:
                return False
            raise EmlocError(
                f"{self.directory} holds a finished job {job.name!r} of another model, other data or other settings.",
                "Choose another zoo, or give the job another name.",
            )
        state, other = self._initial_state(job.name, fingerprint)
        if row is None:
            (position,) = self._fetch_one("SELECT COALESCE(MAX(position), 0) + 1 FROM jobs") or (1,)
            self._database.execute(
                "INSERT INTO jobs (name, position, job, fingerprint, state, duplicate_of) VALUES (?, ?, ?, ?, ?, ?)",
                (job.name, position, job.model_dump_json(), fingerprint, state, other),
            )
            return False
        changed = bool(row[1] != fingerprint)
        now = job if changed else ZooJob.model_validate_json(row[2]).moved_to(job)  # it may have been made smaller
        self._database.execute(
            "UPDATE jobs SET job = ?, fingerprint = ?, state = ?, duplicate_of = ? WHERE name = ?",
            (now.model_dump_json(), fingerprint, state, other, job.name),
        )
        if changed:
            self._database.execute("UPDATE jobs SET needs = NULL WHERE name = ?", (job.name,))
        return changed

    def _settle_duplicates(self) -> None:
        """Give duplicates whose original has changed, or is a duplicate now, a new original, or let them wait."""
        lost = self._database.execute(
            "SELECT jobs.name, jobs.fingerprint FROM jobs JOIN jobs AS first ON first.name = jobs.duplicate_of "
            "WHERE first.fingerprint != jobs.fingerprint OR first.state = 'duplicate' ORDER BY jobs.position"
        ).fetchall()
        for name, fingerprint in lost:
            change = "UPDATE jobs SET state = ?, duplicate_of = ? WHERE name = ?"
            self._database.execute(change, (*self._initial_state(name, fingerprint), name))

    def _initial_state(self, name: str, fingerprint: str) -> tuple[State, str | None]:
        """Return the state of a job that is not done, and the job that is done instead, if there is one.

        A failed job does not count: it may no longer be requested, or its model may have moved.
        """
        first = self._fetch_one(
            "SELECT name FROM jobs WHERE fingerprint = ? AND name != ? AND state NOT IN ('duplicate', 'failed')",
            fingerprint,
            name,
        )
        return ("duplicate", first[0]) if first else ("waiting", None)

    def take_over(self) -> list[str]:
        """Let the jobs that ran under a driver that is gone wait again; return their names. For a new driver."""
        with self._transaction():
            names = [name for (name,) in self._database.execute("SELECT name FROM jobs WHERE state = 'running'")]
            query = "SELECT name, number, started, log FROM attempts WHERE seconds IS NULL"
            for name, number, started, log in self._database.execute(query).fetchall():
                self._database.execute(
                    "UPDATE attempts SET seconds = ?, cause = 'interrupted', message = ? WHERE name = ? AND number = ?",
                    (self._elapsed(started, log), "The driver was stopped while it ran.", name, number),
                )
            self._database.execute("UPDATE jobs SET state = 'waiting' WHERE state = 'running'")
        return names

    def _elapsed(self, started: float, log: str) -> float:
        """Return the seconds from an attempt's start to its log's last change: when it ended is not known."""
        try:
            return max(0.0, round((self.directory / log).stat().st_mtime - started, 3))
        except OSError:
            return 0.0

    def reopen(self, names: Sequence[str]) -> None:
        """Let jobs that were done wait again: their outputs are gone."""
        change = "UPDATE jobs SET state = 'waiting', result = '{}' WHERE name = ?"
        self._apply(*((change, (name,)) for name in names))

    def plan(self, needs: dict[str, Demand]) -> None:
        """Record what jobs need, by name."""
        change = "UPDATE jobs SET needs = ? WHERE name = ?"
        self._apply(*((change, (json.dumps(asdict(need)), name)) for name, need in needs.items()))

    def start(self, name: str, number: int, log: str) -> None:
        """Record that an attempt at a job has begun."""
        attempt = (name, number, time.time(), log)
        self._apply(
            ("UPDATE jobs SET state = 'running' WHERE name = ?", (name,)),
            ("INSERT INTO attempts (name, number, started, log) VALUES (?, ?, ?, ?)", attempt),
        )

    def finish(
        self,
        name: str,
        number: int,
        seconds: float,
        outcome: Outcome,
        *,
        again: bool = False,
        smaller: ZooJob | None = None,
    ) -> None:
        """Record how an attempt ended, and whether the job waits for another one, perhaps made ``smaller``."""
        state = "done" if outcome.cause is None else "waiting" if again else "failed"
        self._apply(
            (
                "UPDATE attempts SET seconds = ?, cause = ?, message = ?, host = ? WHERE name = ? AND number = ?",
                (round(seconds, 3), outcome.cause, outcome.message, outcome.host, name, number),
            ),
            (
                "UPDATE jobs SET state = ?, result = ?, job = COALESCE(?, job) WHERE name = ?",
                (state, json.dumps(outcome.result), smaller and smaller.model_dump_json(), name),
            ),
        )

    def records(self) -> list[JobRecord]:
        """Return all jobs in order, as they are at one moment."""
        while True:
            records, driven = self._read(), is_driven(self.directory)
            running = _running(records)
            if driven or not running:
                return records
            # Without a driver nothing can start: what is running before and after that check was left behind by one.
            again = self._read()
            if _running(again) == running:
                return [_interrupted(record) for record in again]

    def _read(self) -> list[JobRecord]:
        with self._transaction("DEFERRED"):
            jobs = self._database.execute(f"{_JOBS} ORDER BY position").fetchall()
            attempts: dict[str, list[Attempt]] = {}
            for name, *fields in self._database.execute(f"{_ATTEMPTS} ORDER BY name, number"):
                attempts.setdefault(name, []).append(Attempt(*fields))
        records = []
        for job, fingerprint, state, duplicate_of, needs, result in jobs:
            content = ZooJob.model_validate_json(job)
            records.append(
                JobRecord(
                    content,
                    fingerprint,
                    state,
                    duplicate_of,
                    Demand(**json.loads(needs)) if needs else None,
                    json.loads(result),
                    attempts.get(content.name, []),
                )
            )
        return records

    def copy_to(self, other: "Store") -> None:
        """Make another store the same as this one is now."""
        self._database.backup(other._database)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _fetch_one(self, query: str, *values: Any) -> Any:
        return self._database.execute(query, values).fetchone()

    def _apply(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        """Execute statements in one transaction; retry on a full disk, because workers that meet it free some room."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                with self._transaction():
                    for statement, values in statements:
                        self._database.execute(statement, values)
                return
            except DiskFullError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        try:
            self._database.execute(f"BEGIN {kind}")
            yield
            self._database.execute("COMMIT")
        except BaseException as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if _is_of_disk(error):
                raise DiskFullError(f"{self.directory / DATABASE} cannot be used ({error}).", _MAKE_ROOM) from error
            raise


def _create(path: Path) -> None:
    """Make an empty store, completely or not at all: a reader may come at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with closing(_connect(new)) as database:
        # With a write-ahead log, readers see the last complete state, and readers and the writer never wait.
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(_SCHEMA)
    for log in ("-wal", "-shm"):  # left by a removed file: they do not belong to the new one
        path.with_name(path.name + log).unlink(missing_ok=True)
    os.replace(new, path)


def _open(path: Path, *, create: bool) -> sqlite3.Connection:
    """Open a store; to read, also on a full or read-only disk, unless some changes are only in the write-ahead log.

    Raises:
        sqlite3.Error: it cannot be opened, or is not a store.
    """
    queries = [f"{select} LIMIT 1" for select in (_JOBS, _ATTEMPTS)]
    try:
        database = _connect(path)
        for query in queries:
            database.execute(query)
    except sqlite3.OperationalError:
        log = path.with_name(f"{path.name}-wal")
        if create or (log.exists() and log.stat().st_size):
            raise
        # Even to read, SQLite writes an index of that log beside the file, unless it knows that nobody writes.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        database = sqlite3.connect(uri, uri=True, isolation_level=None)
        for query in queries:
            database.execute(query)
    return database


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=30, isolation_level=None)
    # A power failure may lose a commit, a killed process never does; the file is consistent either way.
    database.execute("PRAGMA synchronous = NORMAL")
    return database


def _is_of_disk(error: BaseException) -> bool:
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK_FAULTS


def _running(records: list[JobRecord]) -> dict[str, int]:
    return {record.job.name: len(record.attempts) for record in records if record.state == "running"}


def _interrupted(record: JobRecord) -> JobRecord:
    return record if record.state != "running" else replace(record, state="interrupted")
