"""The driver with workers that only wait, and what is done to them: each fault is done for real."""

import os
import shutil
import signal
from contextlib import closing

import pytest
from support.marks import most_thorough
from support.processes import WaitingEngine, drive, driver, is_gone, until, wait, waiting, workers_of

from emloc_core.errors import EmlocError
from emloc_core.files.inputs import Inputs
from emloc_core.zoo.convert import Preview, convert, preview, require_room
from emloc_core.zoo.driver import RESERVE, Driver
from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.jobs.task import Demand, Task
from emloc_core.zoo.retry import Limits
from emloc_core.zoo.state.store import Store


def causes(record):
    return [attempt.cause for attempt in record.attempts]


def states(records):
    return {name: record.state for name, record in records.items()}


def status(zoo):
    return states({record.job.name: record for record in Store(zoo).records()}) if (zoo / "zoo.db").exists() else {}


def test_each_job_is_done_once_and_has_a_log_and_a_place(tmp_path):
    jobs = [waiting("a"), waiting("b"), waiting("c")]
    events = []
    records = wait(tmp_path, jobs, tell=lambda *args: events.append(args))
    assert {name: causes(record) for name, record in records.items()} == {"a": [None], "b": [None], "c": [None]}
    assert sorted(events) == sorted((name, state, "") for name in "abc" for state in ("running", "done"))
    for name in "abc":
        assert (tmp_path / f"logs/{name}.1.log").is_file()
        assert (tmp_path / f"jobs/{name}/job.json").is_file()
    again = wait(tmp_path, [*jobs, waiting("d")])
    assert [len(record.attempts) for record in again.values()] == [1, 1, 1, 1]


# Killed while the worker's Python starts, or later.
@pytest.mark.parametrize("at_work", most_thorough([False, True], True))
def test_a_killed_driver_takes_its_workers_along_and_the_next_goes_on(tmp_path, at_work):
    first = driver(tmp_path, {"quick": 0, "long": 600, "last": 0}, workers=1)
    try:
        until(lambda: status(tmp_path).get("long") == "running" and workers_of(tmp_path, "long"))
        until(lambda: not at_work or (tmp_path / "logs/long.1.log").read_text() == "waiting 600 s\n")
        workers = workers_of(tmp_path, "long")
        first.send_signal(signal.SIGKILL)
        first.wait()
        until(lambda: all(map(is_gone, workers)))
    finally:
        first.kill()
    until(lambda: status(tmp_path) == {"quick": "done", "long": "interrupted", "last": "waiting"})
    store = Store(tmp_path)
    store._database.execute("UPDATE jobs SET job = json_set(job, '$.data', '0')")  # enough of that
    records = {record.job.name: record for record in _finish(tmp_path)}
    assert states(records) == {"quick": "done", "long": "done", "last": "done"}
    assert causes(records["quick"]) == [None]
    assert causes(records["long"]) == ["interrupted", None]
    assert not at_work or records["long"].attempts[0].seconds > 0  # until its log's last change
    assert causes(records["last"]) == [None]


def _finish(zoo):
    """Resume a zoo as it is."""
    return convert([], zoo, lambda lock: WaitingEngine(1, None, [lock]), Limits())


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path):
    first = driver(tmp_path, {"long": 600})
    try:
        until(lambda: status(tmp_path).get("long") == "running")
        with pytest.raises(EmlocError, match=rf"is being converted already \(process {first.pid}\)"):
            drive(tmp_path, [waiting("b")])
        assert status(tmp_path) == {"long": "running"}
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize("number", most_thorough([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_a_driver_that_is_told_to_stop_says_so_and_leaves_no_worker(tmp_path, number):
    first = driver(tmp_path, {"long": 600})
    try:
        (worker,) = until(lambda: workers_of(tmp_path, "long"))
        first.send_signal(number)
        assert first.wait() == -number  # as a script that has not caught it; the command exits with 128 + number
    finally:
        first.kill()
    assert is_gone(worker)
    (record,) = Store(tmp_path).records()
    assert (record.state, causes(record)) == ("waiting", ["interrupted"])


@pytest.mark.parametrize("number", most_thorough([signal.SIGKILL, signal.SIGTERM], signal.SIGKILL))
def test_a_killed_worker_is_lost_and_tried_again(tmp_path, number):
    killed = []

    def kill(name, state, _):
        if name == "other" and state == "done":
            killed.extend(until(lambda: workers_of(tmp_path, "a")))
            os.kill(killed[0], number)

    records = wait(tmp_path, [waiting("a", 2), waiting("other")], tell=kill)
    assert len(killed) == 1
    assert causes(records["a"]) == ["lost worker", None]
    # SIGTERM makes a worker kill its group; before it can, as it starts, SIGTERM itself ends it.
    ended = {signal.SIGKILL.name, signal.Signals(number).name}
    messages = {f"The worker was killed by {name}. Retrying from where it stopped." for name in ended}
    assert records["a"].attempts[0].message in messages
    assert causes(records["other"]) == [None]


def test_a_worker_that_is_always_killed_fails_and_the_others_finish(tmp_path):
    def kill(name, state, _):
        if name.startswith("other") and state == "done":
            for worker in until(lambda: workers_of(tmp_path, "a")):
                os.kill(worker, signal.SIGKILL)

    jobs = [waiting("a", 600), waiting("other-1"), waiting("other-2", 1)]
    records = wait(tmp_path, jobs, tell=kill, retries=1)
    assert causes(records["a"]) == ["lost worker", "lost worker"]
    assert states(records) == {"a": "failed", "other-1": "done", "other-2": "done"}


def test_the_time_limit_ends_a_worker_and_gives_it_one_more_try(tmp_path):
    workers = set()

    def look(*_):
        workers.update(workers_of(tmp_path, "slow"))

    records = wait(tmp_path, [waiting("slow", 600), waiting("quick")], tell=look, time=3.0, retries=5)
    assert causes(records["slow"]) == ["time limit", "time limit"]
    assert states(records) == {"slow": "failed", "quick": "done"}
    assert workers
    assert all(map(is_gone, workers))


def test_the_time_limit_does_not_count_what_is_copied_first(tmp_path):
    class SlowToBegin(WaitingEngine):
        def is_under_way(self, handle):
            return handle.worker.process.poll() is not None

    records = wait(tmp_path, [waiting("a")], engine=SlowToBegin, time=1e-9, retries=0)
    assert causes(records["a"]) == [None]


def test_input_and_output_are_tried_again_later_and_then_fail(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "a").write_text("a file in the way")
    records = wait(tmp_path, [waiting("a"), waiting("b")], retries=2)
    assert causes(records["a"]) == ["input/output"] * 3
    assert [a.message.rpartition("Retrying")[2] for a in records["a"].attempts[:2]] == [
        " after 0.01 s.",
        " after 0.02 s.",
    ]
    assert states(records) == {"a": "failed", "b": "done"}


def test_what_planning_has_hashed_is_not_read_again(tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    weights.write_text("content")
    hashes = Inputs(tmp_path).hash([weights])
    directory = Task(waiting("a"), 1, Demand()).lay_out(tmp_path)
    monkeypatch.setattr("hashlib.file_digest", None)
    assert Inputs(directory).hash([weights]) == hashes


def run_with_needs(zoo, needs, *, workers=4, memory=1000, tell=lambda *_: None, seconds=0.0, **limits):
    """Drive jobs with the given needs; return the records by name."""
    store = Store(zoo, create=True)
    jobs = [waiting(name, seconds) for name in needs]
    store.add(jobs, list(needs))
    store.plan(needs)
    Driver(store, WaitingEngine(workers, memory), Limits(**limits), tell).run()
    return {record.job.name: record for record in store.records()}


def test_jobs_leave_the_machine_a_headroom(monkeypatch):
    """A plan that took all of it would run out of memory, and its job be tried smaller."""
    monkeypatch.setattr("emloc_core.zoo.engines.local.within_group", lambda *_: (0, 10**10))
    assert WaitingEngine(1).memory == 95 * 10**8
    assert WaitingEngine(1, 10**10).memory == 10**10


def test_as_many_run_side_by_side_as_memory_holds(tmp_path):
    needs = {
        name: Demand(memory=memory) for name, memory in {"a": 400, "b": 500, "c": 600, "d": 100, "e": None}.items()
    }
    running, together = set(), set()

    def tell(name, state, _):
        (running.add if state == "running" else running.discard)(name)
        together.add(frozenset(running))

    records = run_with_needs(tmp_path, needs, tell=tell, seconds=0.3)
    assert set(states(records).values()) == {"done"}
    assert frozenset("abd") in together
    assert all(sum(needs[name].memory or 1000 for name in group) <= 1000 for group in together)


def test_memory_that_others_may_have_taken_makes_no_job_smaller(tmp_path):
    class Hungry(WaitingEngine):
        def poll(self, handle):
            outcome = super().poll(handle)
            failed = outcome and handle.task.job.name == "a" and handle.task.attempt < 3
            return Outcome("out of memory", stage="emulator") if failed else outcome

    running, beside = set(), []

    def tell(name, state, _):
        (running.add if state == "running" else running.discard)(name)
        beside.append(len(running) > 1)

    records = wait(tmp_path, [waiting("b", 1), waiting("a")], engine=Hungry, tell=tell)
    assert [attempt.message for attempt in records["a"].attempts] == [
        "Retrying it alone: other jobs ran at the same time.",
        "Retrying it smaller: compress.samples default -> 32.",
        "",
    ]  # fmt: skip
    assert beside == [False, True, *[False] * 6]


def test_what_never_fits_fails_and_the_others_finish(tmp_path):
    needs = {
        "memory": Demand(memory=1001), "disk": Demand(memory=1, disk=1 << 60), "fits": Demand(memory=1, disk=60),
    }  # fmt: skip
    records = run_with_needs(tmp_path, needs, workers=1)
    assert {name: causes(record) for name, record in records.items()} == {
        "memory": ["out of memory"], "disk": ["disk"], "fits": [None],
    }  # fmt: skip
    assert "1 kB of memory by the plan, but there is only 1 kB" in records["memory"].attempts[0].message
    for attempt in (records["memory"].attempts[0], records["disk"].attempts[0]):
        assert (tmp_path / attempt.log).read_text() == f"emloc: error: {attempt.message}\n"


def test_a_job_whose_files_have_changed_while_it_waited_is_planned_again(tmp_path, monkeypatch):
    """It was recorded as the job that was planned, whose rows it had never seen."""
    rows, edits = tmp_path / "rows.jsonl", []
    rows.write_text("{}")
    jobs = [waiting(name).model_copy(update={"test": [str(rows)]}) for name in ("a", "b")]

    def convert_all():
        prints = [f"{job.name} {rows.read_text()}" for job in jobs]
        monkeypatch.setattr(
            "emloc_core.zoo.convert.plan", lambda *_: [(fingerprint, Demand(memory=0)) for fingerprint in prints]
        )
        return convert(jobs, tmp_path / "zoo", lambda lock: WaitingEngine(1, None, [lock]), tell=lambda *_: edit())

    def edit():
        if not edits:
            edits.append(rows.write_text("{} "))

    a, b = convert_all()
    assert (causes(a), causes(b)) == ([None], ["bad input"])
    assert b.attempts[0].message.startswith(f"{rows} was changed after b was planned. Restore it")
    del jobs[0]
    assert {record.job.name: causes(record) for record in convert_all()} == {"a": [None], "b": ["bad input", None]}


def test_what_is_written_already_needs_no_room_again(tmp_path, monkeypatch):
    monkeypatch.setattr("emloc_core.zoo.driver.free_bytes", lambda _: RESERVE + 50)
    (tmp_path / "jobs/begun/.emulator.partial").mkdir(parents=True)
    (tmp_path / "jobs/begun/.emulator.partial/shard").write_bytes(b"x" * 60)
    needs = dict.fromkeys(("begun", "new"), Demand(memory=1, disk=100))
    records = run_with_needs(tmp_path, needs, workers=1)
    assert {name: causes(record) for name, record in records.items()} == {"begun": [None], "new": ["disk"]}


def test_what_goes_to_a_storage_needs_no_room_here(tmp_path, monkeypatch):
    monkeypatch.setattr("emloc_core.zoo.driver.free_bytes", lambda _: 0)
    records = run_with_needs(tmp_path, {"a": Demand(memory=1, disk=100)}, elsewhere=True)
    assert causes(records["a"]) == [None]


def test_a_dry_run_counts_what_is_left_over_and_not_what_is_done(tmp_path, monkeypatch):
    """As the run does: two jobs write 400 kB each, of which one has written 150 kB."""
    (tmp_path / "jobs/begun/emulator").mkdir(parents=True)
    (tmp_path / "jobs/begun/emulator/emloc.json").write_bytes(b"x" * 150_000)
    needs = Demand(memory=0, disk=400_000)
    run_with_needs(tmp_path, {"done": needs})
    with closing(Store(tmp_path)) as store:
        store.add([waiting("begun")], ["begun"])
        store.plan({"begun": needs})
    monkeypatch.setattr("emloc_core.zoo.convert.plan", lambda *_: [("asked", needs)])
    previews = preview([waiting("asked")], tmp_path)
    assert [(job.name, job.state) for job in previews] == [("asked", "to do"), ("begun", "to do")]
    monkeypatch.setattr("emloc_core.zoo.convert.free_bytes", lambda _: RESERVE + 650_000)
    assert require_room(previews, tmp_path, Limits()) == (650_000, 650_000)
    monkeypatch.setattr("emloc_core.zoo.convert.free_bytes", lambda _: RESERVE + 649_999)
    with pytest.raises(EmlocError, match="The jobs would write 650 kB"):
        require_room(previews, tmp_path, Limits())


def test_a_dry_run_with_nothing_to_write_needs_no_room(tmp_path):
    assert require_room([], tmp_path, Limits(elsewhere=True)) == (0, None)
    done = Preview(waiting("a"), "done", Demand(disk=1 << 60))
    assert require_room([done], tmp_path, Limits())[0] == 0


def test_it_is_said_before_what_a_changed_job_has_made_is_removed(tmp_path, monkeypatch):
    def plan_as(fingerprint):
        monkeypatch.setattr("emloc_core.zoo.convert.plan", lambda *_: [(fingerprint, Demand(memory=0))])

    events, emulator = [], tmp_path / "jobs/a/emulator"
    with closing(Store(tmp_path, create=True)) as store:
        store.add([waiting("a")], ["1"])
    emulator.mkdir(parents=True)
    plan_as("1")
    assert [job.note for job in preview([waiting("a")], tmp_path)] == [""]
    plan_as("2")
    assert ["its earlier output is removed" in job.note for job in preview([waiting("a")], tmp_path)] == [True]
    assert emulator.is_dir()
    convert(
        [waiting("a")], tmp_path, lambda lock: WaitingEngine(1, None, [lock]), tell=lambda *args: events.append(args)
    )
    assert [state for _, state, _ in events] == ["changed", "running", "done"]


def test_what_is_done_and_gone_is_done_again(tmp_path, monkeypatch):
    job, emulator = waiting("a"), tmp_path / "jobs/a/emulator"
    monkeypatch.setattr("emloc_core.zoo.convert.plan", lambda *_: [("a", Demand(memory=0, disk=0))])

    def state():
        (previewed,) = preview([job], tmp_path)
        return previewed.state

    def attempts():
        (record,) = convert([job], tmp_path, lambda lock: WaitingEngine(1, None, [lock]))
        emulator.mkdir(exist_ok=True)
        (emulator / "emloc.json").write_text("{}")
        return causes(record)

    assert (state(), attempts(), state(), attempts()) == ("to do", [None], "done", [None])
    for number, gone in enumerate((emulator, emulator.parent), 2):
        shutil.rmtree(gone)
        assert (state(), attempts(), state()) == ("to do", [None] * number, "done")
    shutil.rmtree(emulator)
    (emulator.parent / "result.json").unlink()  # as where the outputs are in a cluster's storage
    assert (state(), attempts()) == ("done", [None] * 3)
