"""The store is true at all times: what is kept, what is refused, and what a reader sees beside a driver."""

import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from click.testing import CliRunner
from support.processes import wait, waiting

from emloc_core.cli import cli
from emloc_core.errors import DiskFullError, EmlocError
from emloc_core.zoo.convert import preview
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.jobs.task import Demand
from emloc_core.zoo.state.lock import driving, is_driven
from emloc_core.zoo.state.store import Store

FAILED = Outcome("crash", "It broke.", "emulator", host="here")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "zoo", create=True)
    yield store
    store.close()


def states(store):
    return {record.job.name: record.state for record in store.records()}


def test_what_is_kept_is_what_was_said(store):
    job = ZooJob(name="a", model="org/a", data="org/rows", train={"steps": 3}, merge=True)
    store.add([job], ["1"])
    store.plan({"a": Demand(1, 2, 3, 4)})
    store.start("a", 1, "logs/a.1.log")
    store.finish("a", 1, 1.5, FAILED, again=True, smaller=job.smaller("emulator"))
    store.start("a", 2, "logs/a.2.log")
    store.finish("a", 2, 2.5, Outcome(None, result={"ratio": 0.6}, host="there"))
    (record,) = Store(store.directory).records()
    assert (record.fingerprint, record.state, record.needs) == ("1", "done", Demand(1, 2, 3, 4))
    assert record.job == job.smaller("emulator")
    assert record.result == {"ratio": 0.6}
    first, second = record.attempts
    assert (first.number, first.seconds, first.cause, first.message, first.log, first.host) == (
        1, 1.5, "crash", "It broke.", "logs/a.1.log", "here"
    )  # fmt: skip
    assert (second.cause, second.seconds, second.host) == (None, 2.5, "there")


def test_the_second_of_a_fingerprint_is_a_duplicate_whenever_it_comes(store):
    store.add([waiting("a"), waiting("b")], ["1", "1"])
    store.add([waiting("a"), waiting("b"), waiting("c")], ["1", "1", "1"])
    assert [(r.job.name, r.state, r.duplicate_of) for r in store.records()] == [
        ("a", "waiting", None), ("b", "duplicate", "a"), ("c", "duplicate", "a"),
    ]  # fmt: skip


@pytest.mark.parametrize("names", [["b", "a"], ["a", "b"], ["a"]])
def test_what_was_a_duplicate_of_a_job_that_has_changed_is_done_itself(store, names):
    store.add([waiting("a"), waiting("b"), waiting("c")], ["1", "1", "1"])
    store.start("a", 1, "log")
    store.finish("a", 1, 1.0, FAILED)
    now = {"a": "2", "b": "1"}
    store.add([waiting(name) for name in names], [now[name] for name in names])
    assert [(r.job.name, r.state, r.duplicate_of) for r in store.records()] == [
        ("a", "waiting", None), ("b", "waiting", None), ("c", "duplicate", "b"),
    ]  # fmt: skip


def test_a_failed_job_under_another_name_is_done(store):
    store.add([waiting("a"), waiting("c")], ["1", "1"])
    store.start("a", 1, "log")
    store.finish("a", 1, 1.0, FAILED)
    store.add([waiting("b")], ["1"])
    assert states(store) == {"a": "failed", "c": "duplicate", "b": "waiting"}
    store.add([waiting("a")], ["1"])
    assert [(r.job.name, r.state, r.duplicate_of) for r in store.records()] == [
        ("a", "duplicate", "b"), ("c", "duplicate", "b"), ("b", "waiting", None),
    ]  # fmt: skip


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("fingerprints", [{"b": "1"}, {"b": "1", "a": "1"}, {"a": "2", "b": "1"}, {"b": "1", "a": "2"}])
def test_a_dry_run_tells_what_is_done(store, fingerprints, failed, monkeypatch):
    store.add([waiting("a"), waiting("c")], ["1", "1"])
    if failed:
        store.start("a", 1, "log")
        store.finish("a", 1, 1.0, FAILED)
    jobs = [waiting(name) for name in fingerprints]
    monkeypatch.setattr(
        "emloc_core.zoo.convert.plan", lambda *_: [(fingerprint, Demand()) for fingerprint in fingerprints.values()]
    )
    before = store.records()
    predicted = {job.name: job.state for job in preview(jobs, store.directory) if job.name in fingerprints}
    assert store.records() == before
    store.add(jobs, list(fingerprints.values()))
    first = {record.job.name: record.duplicate_of for record in store.records() if record.job.name in fingerprints}
    assert predicted == {name: f"the same as {other}" if other else "to do" for name, other in first.items()}


def test_a_finished_job_is_not_replaced_and_nothing_is_added(store, monkeypatch):
    store.add([waiting("a")], ["1"])
    store.start("a", 1, "log")
    store.finish("a", 1, 1.0, Outcome(None))
    store.add([waiting("a")], ["1"])
    with pytest.raises(EmlocError, match="finished job 'a' of another model"):
        store.add([waiting("b"), waiting("a")], ["3", "2"])
    (store.directory / "jobs/a").mkdir(parents=True)  # its outputs are on a cluster
    monkeypatch.setattr("emloc_core.zoo.convert.plan", lambda *_: [("2", Demand())])
    with pytest.raises(EmlocError, match="finished job 'a' of another model"):
        preview([waiting("a")], store.directory)
    assert states(store) == {"a": "done"}


def test_a_failed_job_waits_again_and_forgets_what_was_of_another_model(store):
    job = ZooJob(name="a", model="org/a")
    store.add([job], ["1"])
    store.plan({"a": Demand(memory=5)})
    store.start("a", 1, "log")
    store.finish("a", 1, 1.0, FAILED, smaller=job.smaller("emulator"))
    store.add([job], ["1"])
    (record,) = store.records()
    assert (record.state, record.needs, record.job.compress.samples) == ("waiting", Demand(memory=5), 32)
    store.add([job], ["2"])
    (record,) = store.records()
    assert (record.needs, record.job, len(record.attempts)) == (None, job, 1)


def test_a_job_that_was_made_smaller_is_found_where_it_is_now(store):
    job = ZooJob(name="a", model="/old/a", data="/old/rows", train={"batch_size": 4}, eval={"tasks": ["/old/task"]})
    store.add([job], ["1"])
    store.start("a", 1, "log")
    smaller = job.smaller("emulator").smaller("evaluation")
    store.finish("a", 1, 1.0, FAILED, smaller=smaller)
    moved = ZooJob(**{**job.model_dump(), "model": "/new/a", "data": "/new/rows", "eval": {"tasks": ["/new/task"]}})
    store.add([moved], ["1"])
    (record,) = store.records()
    assert record.job == moved.smaller("emulator").smaller("evaluation")


def test_a_store_that_was_removed_does_not_come_back(tmp_path):
    """A driver that was killed leaves a log, whose changes SQLite would make in a new file too."""
    with closing(Store(tmp_path, create=True)) as store:
        store.add([waiting("a")], ["1"])
        log = (tmp_path / "zoo.db-wal").read_bytes()
    (tmp_path / "zoo.db").unlink()
    (tmp_path / "zoo.db-wal").write_bytes(log)
    with closing(Store(tmp_path, create=True)) as store:
        assert store.records() == []


def test_what_a_job_has_made_goes_when_it_becomes_another_one_and_only_then(store):
    outputs = store.directory / "jobs/a/emulator"
    outputs.mkdir(parents=True)
    store.add([waiting("a")], ["1"])
    store.start("a", 1, "log")
    store.finish("a", 1, 1.0, FAILED)
    store.add([waiting("a"), waiting("done")], ["1", "3"])
    store.start("done", 1, "log")
    store.finish("done", 1, 1.0, Outcome(None))
    with pytest.raises(EmlocError, match="finished job 'done' of another model"):
        store.add([waiting("a"), waiting("done")], ["2", "4"])
    assert outputs.is_dir()
    store.add([waiting("a")], ["2"])
    assert list((store.directory / "jobs").iterdir()) == []


def test_running_without_a_driver_is_interrupted_until_the_next_takes_over(store):
    store.add([waiting("a")], ["1"])
    with driving(store.directory):
        store.start("a", 1, "log")
        assert states(store) == {"a": "running"}
    assert states(store) == {"a": "interrupted"}
    assert store.take_over() == ["a"]
    (record,) = store.records()
    assert record.state == "waiting"
    assert record.attempts[0].cause == "interrupted"


def test_a_zoo_whose_jobs_are_being_planned_has_none_yet(store):
    assert CliRunner().invoke(cli, ["zoo", "status", str(store.directory)]).output == "no jobs yet\n"


def test_a_zoo_has_one_driver(tmp_path):
    with driving(tmp_path):
        assert is_driven(tmp_path)
        with pytest.raises(EmlocError, match="is being converted already"), driving(tmp_path):
            pass
    assert not is_driven(tmp_path)


def test_what_is_no_zoo(tmp_path):
    with pytest.raises(EmlocError, match="There is no zoo at"):
        Store(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "zoo.db").write_text("nothing of the kind" * 100)
    for create in (True, False):
        with pytest.raises(EmlocError, match=r"cannot be opened .* Restore it"):
            Store(tmp_path, create=create)
    (tmp_path / "zoo.db").unlink()
    with closing(sqlite3.connect(tmp_path / "zoo.db")) as other:
        other.execute("CREATE TABLE jobs (id)")
    with pytest.raises(EmlocError, match=r"cannot be opened \(no such column: job\). Restore it"):
        Store(tmp_path)


_READ = """
import resource, sys
from pathlib import Path
from emloc_core.errors import DiskFullError, EmlocError
from emloc_core.zoo.state.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nothing can be written, as on a full disk
try:
    print([record.job.name for record in Store(Path(sys.argv[1])).records()])
except EmlocError as error:
    print(error)
"""


def test_a_zoo_is_read_where_nothing_can_be_written(tmp_path):
    def read():
        command = [sys.executable, "-c", _READ, tmp_path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    store = Store(tmp_path, create=True)
    store.add([waiting("a")], ["1"])
    log = (tmp_path / "zoo.db-wal").read_bytes()
    store.close()
    assert read() == "['a']\n"
    (tmp_path / "zoo.db-wal").write_bytes(log)  # the last changes of a driver that was killed are in it alone
    assert "cannot be opened (disk I/O error). Its disk is full or read-only" in read()


@pytest.mark.parametrize(
    "change",
    [lambda store: store.start("a", 1, "x" * 100_000), lambda store: store.add([waiting("b")], ["x" * 100_000])],
    ids=["after a while", "at once"],
)
def test_a_disk_that_fills_up_is_said_in_a_sentence(store, monkeypatch, change):
    """After a while, where workers that meet it may give room back; before there are any, at once."""
    monkeypatch.setattr("emloc_core.zoo.state.store._PATIENCE", 0.2)
    store.add([waiting("a")], ["1"])
    store._database.execute("PRAGMA max_page_count = 1")  # as many as there are
    with pytest.raises(DiskFullError, match=r"zoo\.db cannot be used \(database or disk is full\)\. Its disk is full"):
        change(store)
    assert states(store) == {"a": "waiting"}


def test_a_reader_beside_a_driver_sees_whole_states_only(tmp_path):
    """Reads as fast as it can while 24 jobs are done: no state contradicts its attempts, and nothing goes back."""
    zoo, jobs = tmp_path / "zoo", [waiting(f"job-{number}") for number in range(24)]
    Store(zoo, create=True).close()
    counts, wrong, finished = [], set(), threading.Event()

    def read():
        store = Store(zoo)
        while not finished.is_set():
            records = store.records()
            counts.append(sum(record.state == "done" for record in records))
            for record in records:
                last = record.attempts[-1] if record.attempts else None
                fits = {
                    "waiting": last is None,
                    "running": last is not None and last.seconds is None,
                    "done": last is not None and last.seconds is not None and last.cause is None,
                }
                if not fits.get(record.state, False):
                    wrong.add((record.job.name, record.state))

    class Watched:
        """An engine without processes, one job at a time, each done when the reader has looked a few times."""

        def __init__(self, *_):
            self.is_free, self.close = True, lambda: None

        def has_room(self, _task):
            return self.is_free

        def start(self, _task, _directory):
            self.is_free = False
            return len(counts) + 3

        def is_under_way(self, _looks):
            return True

        def poll(self, looks):
            if len(counts) < looks and reader.is_alive():
                return None
            self.is_free = True
            return Outcome(None)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait(zoo, jobs, engine=Watched)
    finally:
        finished.set()
        reader.join()
    assert wrong == set()
    assert counts == sorted(counts)
    assert len(set(counts)) > 20  # it did look while jobs ended
