"""The Ray engine on a cluster of two nodes, both on this machine: same bytes as here, and what survives which loss."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import Mock

import psutil
import pytest
from support.processes import planning_here

import emloc_core.zoo.engines.cluster
from emloc_core.cli import cli
from emloc_core.errors import EmlocError
from emloc_core.files.documents import write_json
from emloc_core.files.output import TIMING
from emloc_core.settings import CompressSettings
from emloc_core.zoo.convert import convert
from emloc_core.zoo.engines.cluster import RayEngine, RayHandle
from emloc_core.zoo.engines.connect import confine
from emloc_core.zoo.engines.engine import RefusedError
from emloc_core.zoo.engines.local import LocalEngine
from emloc_core.zoo.engines.node import Order, output_names, perform
from emloc_core.zoo.engines.storage import Storage, input_name, share
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.outcome import Cause, Outcome
from emloc_core.zoo.jobs.task import Demand, Task, write_job
from emloc_core.zoo.state.store import Store

NODE = {"num_cpus": 1, "memory": 4 << 30, "object_store_memory": 80 << 20, "include_dashboard": False}
SMALL = CompressSettings(samples=8, selection=0, ratio=0.5)


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes with a processor each, confined like one that emloc starts itself."""
    confine()
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args=NODE)
    started.add_node(**NODE)
    yield started
    started.shutdown()


@pytest.fixture(scope="module")
def jobs(tiny_model, rows_file, tmp_path_factory):
    """Four models: two different ones, one with a truncated shard, and the first again under another name."""
    models, zoo_jobs = tmp_path_factory.mktemp("zoo-models"), []
    for name in ("first", "other", "broken", "again"):
        model = Path(shutil.copytree(tiny_model, models / name))
        zoo_jobs.append(ZooJob(name=name, model=str(model), data=str(rows_file), compress=SMALL, offline=True))
    (models / "other" / "generation_config.json").write_text("{}")  # else it were the first again
    shard = models / "broken" / "model.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    return zoo_jobs


@pytest.fixture(scope="module")
def emulator(jobs, tmp_path_factory):
    """The emulator of the first as the local engine makes it."""
    zoo = tmp_path_factory.mktemp("local")
    drive(jobs[:1], zoo, lambda lock: LocalEngine(2, inherited=[lock]))
    return contents(zoo / "jobs" / "first" / "emulator")


def drive(jobs, zoo, make_engine):
    with planning_here():
        return convert(jobs, zoo, make_engine)


def states(records):
    return {record.job.name: record.state for record in records}


def causes(records):
    return {record.job.name: [attempt.cause for attempt in record.attempts] for record in records}


def contents(directory):
    """All files of an output except the timings."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != TIMING}


def workers(zoo):
    """The workers of a zoo on this machine; their stages, which are forks of them, included."""
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "emloc_core.zoo.engines.worker" in command and command[-1].startswith(str(zoo)):
            processes.append(process)
    return processes


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_both_engines_write_the_same_bytes_though_a_worker_and_a_node_are_lost(cluster, jobs, emulator, tmp_path):
    """Two jobs are at work, one on each node. The worker of one is killed, and the node of the other is removed."""
    node = next(node for node in cluster.worker_nodes)
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    on_node, niceness = [], set()

    def lose():
        wait_for(lambda: all(workers(tmp_path / "jobs" / job.name) for job in jobs[:2]))
        is_on_node = {process: raylet in process.parents() for process in workers(tmp_path)}
        niceness.update(process.nice() for process in is_on_node)
        on_node.extend(process for process, there_too in is_on_node.items() if there_too)
        next(process for process, there_too in is_on_node.items() if not there_too).kill()
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    records = drive(jobs, tmp_path, lambda _: RayEngine(address=cluster.address))
    thread.join()
    cluster.add_node(**NODE)
    assert states(records) == {"first": "done", "other": "done", "broken": "failed", "again": "duplicate"}
    lost = ["lost worker", None]
    assert causes(records) == {"first": lost, "other": lost, "broken": ["bad input"], "again": []}
    first, other, broken, _ = (record.attempts for record in records)
    assert sorted("SIGKILL" in attempts[0].message for attempts in (first, other)) == [False, True]
    assert niceness == {psutil.Process().nice()}
    assert on_node
    assert not any(process.is_running() for process in on_node)
    assert "model.safetensors" in broken[0].message
    assert "model.safetensors" in (tmp_path / broken[0].log).read_text()
    assert contents(tmp_path / "jobs" / "first" / "emulator") == emulator
    assert any(file.endswith(".safetensors") for file in emulator)


@pytest.mark.thorough
def test_outputs_go_to_storage(cluster, jobs, emulator, tmp_path):
    zoo, remote = tmp_path / "zoo", tmp_path / "remote"
    engine = RayEngine(address=cluster.address, storage=remote.as_uri())
    (record,) = drive(jobs[:1], zoo, lambda _: engine)
    assert record.state == "done"
    assert not (zoo / "jobs" / "first" / "emulator").exists()
    inputs = {path: input_name(Path(path)) for path in (jobs[0].model, jobs[0].data)}
    name = output_names(jobs[0], inputs)["emulator"]
    assert list((remote / "jobs" / "first").iterdir()) == [remote / name]
    assert Storage(str(remote)).has(name)
    assert contents(remote / name) == emulator
    assert not list(remote.rglob("*.partial"))
    log = (zoo / record.attempts[0].log).read_text()
    assert log.startswith("compress: ")
    assert log == (remote / record.attempts[0].log).read_text()


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind(cluster, jobs, rows_file, tmp_path):
    zoo = tmp_path / "zoo"
    models = [Path(shutil.copytree(jobs[0].model, tmp_path / name)) for name in ("one", "two")]
    (models[1] / "generation_config.json").write_text("{}")  # else it were a duplicate
    command = [sys.executable, "-m", "emloc_core", "zoo", "convert", *map(str, models), "-o", str(zoo), "--offline",
               "--data", str(rows_file), "--samples", "8", "--selection", "0", "--ratio", "0.5",
               "--engine", "ray", "--address", cluster.address]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as driver:
        wait_for(lambda: workers(zoo))
        assert {record.state for record in Store(zoo).records()} <= {"running", "waiting"}
        driver.send_signal(signal.SIGKILL)
    wait_for(lambda: not workers(zoo))
    stored = Store(zoo).records()
    interrupted = {record.job.name for record in stored if record.state == "interrupted"}
    assert interrupted
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    records = Store(zoo).records()
    assert len(records) == 2
    for record in records:
        before = ["interrupted"] if record.job.name in interrupted else []
        assert [attempt.cause for attempt in record.attempts] == [*before, None]
    assert not workers(zoo)


@pytest.mark.thorough
def test_fetches_what_a_node_does_not_have(jobs, tmp_path):
    directory, storage = tmp_path / "elsewhere", Storage("memory://zoo")
    shutil.copytree(jobs[0].model, directory)
    rows = Path(shutil.copy(jobs[0].data, tmp_path / "rows.jsonl"))
    job = jobs[0].model_copy(update={"model": str(directory), "data": str(rows)})
    inputs = {str(path): share(storage, path) for path in (directory, rows)}
    shutil.rmtree(directory)
    rows.unlink()
    order = Order(job.model_dump_json(), str(tmp_path), "logs/first.1.log", "memory://zoo", inputs)
    outcome = perform(order)
    assert outcome["cause"] is None, storage.read("logs/first.1.log").decode()
    emulator = output_names(job, inputs)["emulator"]
    storage.fetch(emulator, tmp_path / "first")
    assert any(name.endswith(".safetensors") for name in contents(tmp_path / "first"))
    # Another worker finds the output there, and has nothing to do.
    assert perform(order)["result"] == outcome["result"]
    storage.fetch(emulator, tmp_path / "second")
    assert (tmp_path / "second" / TIMING).read_bytes() == (tmp_path / "first" / TIMING).read_bytes()


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """A class of workers that are done at once and end at the third poll, by ``cause``; ``jobs`` lists their jobs."""

    class FinishedWorker:
        cause, jobs = None, []

        def __init__(self, job, directory, log, _):
            self.jobs.append(job)
            self.looks = 0
            log.write_text("made\n")
            (directory / "emulator").mkdir()
            write_json(directory / "emulator" / "emloc.json", {})

        def outcome(self):
            self.looks += 1
            return Outcome(self.cause) if self.looks == 3 else None

        def end(self):
            pass

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(emloc_core.zoo.engines.node, "Worker", FinishedWorker)
    monkeypatch.setattr(emloc_core.zoo.engines.node, "_MIRROR", 0)
    return FinishedWorker


def test_storage_that_fails_for_a_while_ends_no_worker(jobs, worker, tmp_path, monkeypatch):
    storage, order = Storage(str(tmp_path / "remote")), Order(jobs[0].model_dump_json(), "", "log", None, {})
    order = replace(order, storage=storage.url)
    publish, fail = Storage.publish, Mock(side_effect=OSError("it is away"))
    monkeypatch.setattr(Storage, "write", fail)
    monkeypatch.setattr(Storage, "publish", lambda *args: publish(*args) if fail.called else fail())
    assert perform(order)["cause"] is None
    assert len(worker.jobs) == 1
    assert storage.has(output_names(jobs[0], {})["emulator"])


@pytest.mark.parametrize("cause", get_args(Cause))
def test_a_node_keeps_what_another_attempt_resumes_and_no_more(jobs, worker, tmp_path, monkeypatch, cause):
    monkeypatch.setattr(worker, "cause", cause)
    order = Order(jobs[0].model_dump_json(), "", "log", str(tmp_path / "remote"), {})
    assert perform(order)["cause"] == cause
    kept = list((tmp_path / "temporary").glob("*/*"))
    assert bool(kept) == (cause not in ("bad input", "disk", "out of memory"))


def test_another_file_in_that_place_is_not_the_drivers(jobs, worker, tmp_path):
    rows = Path(shutil.copy(jobs[0].data, tmp_path / "rows.jsonl"))
    storage = Storage(str(tmp_path / "remote"))
    job = jobs[0].model_copy(update={"data": str(rows)})
    inputs = {str(rows): share(storage, rows)}
    order = Order(job.model_dump_json(), "", "log", storage.url, inputs)
    assert perform(order)["cause"] is None
    storage.files.rm(storage._path("jobs"), recursive=True)
    rows.write_text("{}\n")
    assert perform(order)["cause"] is None
    original, fetched = (Path(job.data) for job in worker.jobs)
    assert (original, fetched.name) == (rows, rows.name)
    assert fetched.is_relative_to(tmp_path / "temporary")


def test_another_job_of_the_name_has_outputs_of_its_own():
    job = ZooJob(name="a", model="org/model", data="rows.jsonl", train={"batch_size": 4}, eval={"tasks": ["arc_easy"]})
    names = output_names(job, {"rows.jsonl": "inputs/1"})
    assert list(names) == ["emulator", "adapter", "corrected", "evaluation"]
    assert names == output_names(job.model_copy(update={"offline": True}), {"rows.jsonl": "inputs/1"})

    def kept(other, rows="inputs/1"):
        other_names = output_names(other, {"rows.jsonl": rows})
        return [stage for stage, name in other_names.items() if name == names[stage]]

    assert kept(job.smaller("emulator")) == []
    assert kept(job, rows="inputs/2") == []
    assert kept(job.model_copy(update={"threads": 2})) == []
    assert kept(job.smaller("adapter")) == ["emulator"]
    assert kept(job.smaller("evaluation")) == ["emulator", "adapter", "corrected"]


def test_a_node_that_does_not_share_the_disk(jobs, tmp_path):
    outcome = perform(Order(jobs[0].model_dump_json(), str(tmp_path), "logs/a.1.log", None, {}))
    assert outcome["cause"] == "input/output"
    assert "--storage" in outcome["message"]
    assert not list(tmp_path.rglob("*.log"))


def test_a_node_with_another_version(jobs, tmp_path):
    order = Order(jobs[0].model_dump_json(), str(tmp_path), "logs/a.1.log", None, {}, version="0.0.1")
    outcome = perform(order)
    assert outcome["cause"] == "bad input"
    assert "0.0.1" in outcome["message"]


def test_two_workers_never_share_a_directory(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(emloc_core.zoo.engines.node, "_PATIENCE", 0.2)
    job = jobs[0].model_copy(update={"data": None})
    directory = tmp_path / "jobs" / job.name
    write_job(job, directory)
    order = Order(job.model_dump_json(), str(tmp_path), "logs/a.1.log", None, {})
    with emloc_core.zoo.engines.node._alone(directory):
        assert perform(order)["cause"] == "input/output"
    assert "no rows to calibrate on" in perform(order)["message"]  # it is the worker that says so


@pytest.fixture
def engine(monkeypatch):
    """A function that gives an engine of a cluster that is not there: only what its nodes have is known, and unused."""

    def make(*nodes, unused=None, **options):
        class Ray:
            def nodes(self):
                return [{"Alive": alive, "Resources": resources} for alive, resources in nodes]

            def available_resources(self):
                return unused

            def remote(self, function):
                return function

        monkeypatch.setattr(emloc_core.zoo.engines.cluster, "connect", lambda *_: Ray())
        return RayEngine(**options)

    return make


def task(threads=1, memory=1 << 30):
    return Task(ZooJob(name="a", model="none", threads=threads), 1, Demand(memory=memory))


def started(engine, task, tmp_path):
    """Return how many such tasks an engine starts before it has no room."""
    engine._submit = lambda *_: None
    count = 0
    while engine.has_room(task):
        engine.start(task, tmp_path)
        count += 1
    return count


def test_asks_for_what_the_plan_says(engine, tmp_path):
    two = [(True, {"CPU": 4.0, "memory": 8.0 * 2**30}), (True, {"CPU": 2.0, "memory": 3.0 * 2**30})]
    gone = (False, {"CPU": 64.0, "memory": 2.0**40})
    assert started(engine(*two, gone), task(), tmp_path) == 6
    assert started(engine(*two), task(threads=3), tmp_path) == 2
    assert started(engine(*two), task(memory=4 << 30), tmp_path) == 2
    assert started(engine(*two, workers=3), task(), tmp_path) == 3
    assert started(engine(*two, memory=2 << 30), task(), tmp_path) == 2
    unknown = engine(*two)
    assert unknown._ask(task(memory=None), unknown._nodes())["memory"] == 3 << 30
    gpus = engine(*two, (True, {"CPU": 8.0, "GPU": 2.0, "memory": 8.0 * 2**30}))
    assert started(gpus, task(), tmp_path) == 2


def test_what_others_use_is_not_there(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(emloc_core.zoo.engines.cluster, "_FRESH", 1e6)
    node = (True, {"CPU": 8.0, "memory": 8.0 * 2**30})
    assert started(engine(node, unused={"CPU": 3.0, "memory": 6.0 * 2**30}), task(), tmp_path) == 3
    assert started(engine(node, unused={"CPU": 3.0, "memory": 2.0 * 2**30}), task(), tmp_path) == 2
    assert started(engine(node, unused={"memory": 8.0 * 2**30}), task(), tmp_path) == 0  # all processors are taken
    assert started(engine(node, unused={}), task(), tmp_path) == 8


@pytest.mark.parametrize(("wanted", "cause"), [({"threads": 8}, "bad input"), ({"memory": 9 << 30}, "out of memory")])
def test_refuses_what_no_node_has(engine, wanted, cause):
    with pytest.raises(RefusedError, match="no node of the cluster") as refused:
        engine((True, {"CPU": 4.0, "memory": 8.0 * 2**30})).has_room(task(**wanted))
    assert refused.value.cause == cause


def test_no_cluster_there():
    with pytest.raises(EmlocError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        RayEngine(address="127.0.0.1:1")


@pytest.mark.parametrize("option", [["--address", "auto"], ["--storage", "memory://zoo"]])
def test_options_of_clusters_are_for_clusters(option, tmp_path):
    argv = ["zoo", "convert", str(tmp_path), "-o", str(tmp_path / "zoo"), *option]
    with pytest.raises(EmlocError, match="Add --engine ray"):
        cli.main(argv, standalone_mode=False)
    assert not (tmp_path / "zoo").exists()


def test_storage_that_cannot_be_asked_ends_an_attempt_and_not_the_driver(engine, jobs, tmp_path, monkeypatch):
    ray = engine((True, {"CPU": 1.0}), storage="memory://away")
    ray._ray.wait, ray._ray.get = lambda futures, **_: (futures, []), lambda _: {"cause": None, "host": "far"}
    ray._ray.exceptions = SimpleNamespace(**dict.fromkeys(("OutOfMemoryError", "RayTaskError", "RayError"), KeyError))
    ray._submit = lambda *_: None
    handle = ray.start(Task(jobs[0], 1, Demand()), tmp_path)
    handle.submitted.result()
    monkeypatch.setattr(ray._storage.files, "isfile", Mock(side_effect=RuntimeError("no route")))
    monkeypatch.setattr(ray._storage.files, "cat_file", Mock(side_effect=RuntimeError("no route")))
    outcome = ray.poll(handle)
    assert outcome.cause == "input/output"
    assert "no route" in outcome.message


@pytest.mark.usefixtures("worker")
def test_a_temporary_directory_of_another_user_is_not_used(jobs, tmp_path, monkeypatch):
    order = Order(jobs[0].model_dump_json(), "", "log", str(tmp_path / "remote"), {})
    assert perform(order)["cause"] is None
    (directory,) = (tmp_path / "temporary").iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    me = os.getuid()
    directory.rename(directory.with_name(f"emloc-zoo-{me + 1}"))
    monkeypatch.setattr("os.getuid", lambda: me + 1)
    with pytest.raises(EmlocError, match="belongs to another user"):
        perform(order)


def test_an_id_of_the_hub_is_no_path_here(engine, tmp_path, monkeypatch):
    (tmp_path / "organisation/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    ray = engine((True, {"CPU": 1.0}), storage="memory://zoo")
    ray._submit = lambda *_: None
    job = ZooJob(name="a", model="organisation/model", data=str(tmp_path))
    assert ray.start(Task(job, 1, Demand()), tmp_path / "zoo").inputs.keys() == {str(tmp_path)}


def test_an_output_that_is_not_seen_is_not_believed(engine, jobs, tmp_path):
    ray = engine((True, {"CPU": 1.0}))
    handle = RayHandle(Task(jobs[0], 1, Demand()), tmp_path, {}, {}, Future())
    outcome = ray._verified(Outcome(None, host="far"), handle)
    assert outcome.cause == "input/output"
    emulator = tmp_path / "jobs" / "first" / "emulator"
    emulator.mkdir(parents=True)
    write_json(emulator / "emloc.json", {})
    assert ray._verified(Outcome(None), handle).cause is None
