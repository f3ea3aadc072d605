"""Real conversions of tiny models: whole, damaged, without memory, without room, killed; nothing lost or done twice.

One zoo is converted by the command, killed and started again, and most tests look at it. All processes are forks of one
that has imported what they need, which would take each of them seconds.
"""

import json
import os
import re
import resource
import shutil
import signal
import struct
import time
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner
from support.driver import ForkingDriver, emloc
from support.processes import drive, files, is_gone, planning_here, until, workers_of

from emloc_core.cli import cli
from emloc_core.hookspecs import hookimpl
from emloc_core.plugins.manager import plugin_manager
from emloc_core.zoo.driver import RESERVE
from emloc_core.zoo.engines.local import LocalEngine
from emloc_core.zoo.engines.worker import run
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.sources import Defaults, resolve
from emloc_core.zoo.state.lock import is_driven
from emloc_core.zoo.state.store import Store

SMALL = {"samples": 12, "selection": 6}
OPTIONS = ["--samples", "12", "--selection", "6"]


class Waits:
    """A plugin that holds a stage up when its first block is done."""

    @hookimpl
    def emloc_block_done(self):
        print("a block is done", flush=True)
        time.sleep(600)


def wait_in_a_block(*argv):
    plugin_manager().register(Waits())
    emloc(*argv)


def run_command(log, *argv):
    """Run a command of the zoo; return its exit code, and what it printed on stdout and stderr."""
    code = ForkingDriver(log, emloc, "zoo", *argv).wait()
    return code, log.read_text(), log.with_suffix(".err").read_text()


def run_here(*argv):
    """Run a command of the zoo in this process, its plans too; return what it printed and what it raised."""
    with planning_here():
        return CliRunner().invoke(cli, ["zoo", *map(str, argv)])


def by_name(stdout):
    return {job["name"]: job for job in json.loads(stdout)["jobs"]}


def causes(jobs):
    return {name: [attempt["cause"] for attempt in job["attempts"]] for name, job in jobs.items()}


@pytest.fixture(scope="module")
def root(tiny_model, rows_file, tmp_path_factory):
    """A model, its copy, and one with a truncated shard; and a file of jobs beside them."""
    root = tmp_path_factory.mktemp("zoo")
    for name in ("copy", "cut", "first"):
        shutil.copytree(tiny_model, root / "models" / name)
    weights = root / "models" / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copy(rows_file, root / "rows.jsonl")
    (root / "jobs.toml").write_text(
        '[[job]]\nname = "whole-way"\nmodel = "models/first"\ndata = "rows.jsonl"\nratio = 0.5\n'
        "compress = { samples = 12, selection = 6 }\n"
        "train = { steps = 2, batch_size = 2, bf16 = false }\ncorrect = { clamp = 3 }\n"
        '[[job]]\nname = "absent"\nmodel = "organisation/not-here"\n'
    )
    return root


@pytest.fixture(scope="module")
def arguments(root):
    """The command that converts all of them, the copy first."""
    return ["convert", root / "models", root / "jobs.toml", "-o", root / "zoo", "--data", root / "rows.jsonl",
            *OPTIONS, "--json", "--offline"]  # fmt: skip


@pytest.fixture(scope="module")
def killed(root, arguments):
    """The states of the zoo when its driver was killed while the first stage of the first job was at work."""
    zoo = root / "zoo"
    driver = ForkingDriver(root / "killed.log", wait_in_a_block, "zoo", *arguments, "--workers", "1")
    try:
        until(lambda: [log for log in zoo.glob("logs/copy.*") if "a block is done" in log.read_text()])
        workers = workers_of(zoo, "copy")
        assert len(workers) == 2  # the worker and its stage
        driver.kill()
        until(lambda: all(map(is_gone, workers)))
    finally:
        driver.kill()
    until(lambda: not is_driven(zoo))  # a thread of theirs may hold the lock for a moment more
    return {record.job.name: record.state for record in Store(zoo).records()}


@pytest.fixture(scope="module")
def converted(killed, root, arguments):  # noqa: ARG001 - it resumes what that one left
    """The same command again, to its end; it fails because two jobs fail."""
    return run_command(root / "converted.log", *arguments, "--workers", "2")


@pytest.fixture(scope="module")
def alone(tiny_model, rows_file, tmp_path_factory):
    """An emulator made by the command alone with one thread, and its peak address space, in bytes."""
    root = tmp_path_factory.mktemp("alone")
    argv = ["compress", tiny_model, "--data", rows_file, "-o", root / "emulator", *OPTIONS]
    assert ForkingDriver(root / "log", emloc_and_peak, *argv).wait() == 0
    return root / "emulator", int((root / "log").read_text().splitlines()[-1]) << 10


def emloc_and_peak(*argv):
    """Run a command, and print the peak address space of this process, in kB."""
    try:
        emloc(*argv)
    finally:
        print(re.search(r"VmPeak:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def contents(directory):
    """Return contents by name, except the timings, in which runs differ."""
    return {name: content for name, (content, *_) in files(directory).items() if name != "timing.json"}


def test_killed_at_work_the_next_driver_finishes(killed, converted):
    assert killed == {
        "copy": "interrupted", "cut": "waiting", "first": "duplicate", "whole-way": "waiting", "absent": "waiting",
    }  # fmt: skip
    assert causes(by_name(converted[1])) == {
        "copy": ["interrupted", None], "cut": ["bad input"], "first": [], "whole-way": [None], "absent": ["bad input"],
    }  # fmt: skip


def test_one_failure_stops_nothing_and_is_said(converted, root):
    code, out, err = converted
    assert code == 1
    assert "2 of 5 jobs failed. cut: bad input: " in err
    assert "; absent: bad input: " in err
    jobs = by_name(out)
    assert {name: job["state"] for name, job in jobs.items()} == {
        "copy": "done", "cut": "failed", "first": "duplicate", "whole-way": "done", "absent": "failed",
    }  # fmt: skip
    assert jobs["first"]["duplicate_of"] == "copy"
    for name, expected in {"cut": "model.safetensors", "absent": "organisation/not-here"}.items():
        (attempt,) = jobs[name]["attempts"]  # another attempt would not fix it
        assert expected in attempt["message"]
        assert attempt["message"] in (root / "zoo" / attempt["log"]).read_text()


def test_a_result_has_sizes_errors_time_and_memory(converted):
    result = by_name(converted[1])["whole-way"]["result"]
    assert result["ratio"] == 0.5
    assert 0 < result["bytes"]["emulator"] < result["bytes"]["base"]
    assert list(result["stages"]) == ["adapter", "corrected", "emulator"]
    assert all(stage["seconds"] > 0 and stage["peak_rss_bytes"] > 1e7 for stage in result["stages"].values())
    assert len(result["linears"]) == 21
    assert all(0 < linear["relative_error"] < 1 for linear in result["linears"])
    assert result["correction"]


@pytest.mark.usefixtures("converted")
def test_an_emulator_is_that_of_the_command_alone(root, tiny_model, alone):
    """Though the driver that began it was killed."""
    ours, theirs = contents(root / "zoo/jobs/copy/emulator"), contents(alone[0])
    theirs["emloc.json"] = theirs["emloc.json"].replace(str(tiny_model).encode(), str(root / "models/copy").encode())
    theirs["README.md"] = theirs["README.md"].replace(tiny_model.name.encode(), b"copy")
    assert ours == theirs


@pytest.mark.usefixtures("converted")
def test_again_nothing_is_done_twice_and_what_was_fixed_or_is_gone_is_done(root, arguments):
    zoo = root / "zoo"
    before = {path: files(path) for path in zoo.glob("jobs/whole-way/*") if path.is_dir()}
    assert len(before) == 3
    emulator = zoo / "jobs/copy/emulator"
    original = contents(emulator)
    # What was repaired had been begun with other settings.
    shutil.move(emulator, zoo / "jobs/cut/emulator")
    shutil.copytree(zoo / "jobs/whole-way/adapter", zoo / "jobs/cut/.adapter.partial")
    shutil.copytree(root / "models" / "first", root / "models" / "cut", dirs_exist_ok=True)
    config = root / "models" / "cut" / "config.json"
    config.write_text(config.read_text() + " ")  # else it is a duplicate too
    (root / "jobs.toml").write_text((root / "jobs.toml").read_text().rpartition("[[job]]")[0])
    code, out, err = run_command(root / "again.log", *arguments)
    assert (code, "failed" in err) == (0, False)  # what is not asked for any more stays as it was
    assert {path: files(path) for path in before} == before
    assert contents(emulator) == original
    assert [path.name for path in (zoo / "jobs/cut").iterdir() if path.is_dir()] == ["emulator"]
    jobs = by_name(out)
    assert causes(jobs) == {
        "copy": ["interrupted", None, None], "cut": ["bad input", None], "first": [], "whole-way": [None],
        "absent": ["bad input"],
    }  # fmt: skip
    assert "5 jobs: 3 done, 1 duplicate, 1 failed" in run_here("status", zoo).stdout
    assert by_name(run_here("status", zoo, "--json").stdout) == jobs


def test_a_dry_run_makes_nothing_and_refuses_what_the_disk_cannot_hold(root, tmp_path, monkeypatch):
    zoo = tmp_path / "zoo"
    monkeypatch.setattr("emloc_core.zoo.convert.free_bytes", lambda _: RESERVE + 1_000_000)
    result = run_here("convert", root / "models" / "first", root / "models" / "copy", "-o", zoo, *OPTIONS, "--data",
                      root / "rows.jsonl", "--kind", "low-rank", "--dry-run")  # fmt: skip
    assert "  1. first  to do   base 144 kB, emulator 95.9 kB, disk 33.7 MB, memory " in result.stdout
    assert "the same as first" in result.stdout
    assert f"The jobs would write 33.7 MB, but {zoo} has room for only 1 MB." in str(result.exception)
    assert not zoo.exists()


def test_as_many_work_as_there_are_processors_to_use(tmp_path, tiny_model, rows_file, monkeypatch):
    engines = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 4, 6, 8})
    monkeypatch.setattr("emloc_core.zoo.convert.convert", lambda *args: engines.append(args[2](0)) or [])
    for threads in (1, 2):
        run_here("convert", tiny_model, "-o", tmp_path, "--data", rows_file, "--threads", threads)
    assert [engine.workers for engine in engines] == [5, 2]


def test_a_job_without_rows_is_bad_input(tmp_path):
    outcome = run(ZooJob(name="a", model="org/a"), tmp_path)
    assert (outcome.cause, outcome.message) == (
        "bad input", "a has no rows to calibrate on. Give --data, or data of its own."
    )  # fmt: skip


class Hostile(LocalEngine):
    """The local engine where the kernel gives "hungry" and "full" too little, and the first stage of "well" is killed.

    Attributes:
        limits: of workers, by job and resource.
        killed: processes.
    """

    limits: ClassVar[dict] = {}
    killed: ClassVar[list] = []

    def start(self, task, directory):
        own = {kind: resource.getrlimit(kind) for kind in self.limits.get(task.job.name, {})}
        for kind, (_, hard) in own.items():
            resource.setrlimit(kind, (self.limits[task.job.name][kind], hard))  # the worker inherits it
        try:
            return super().start(task, directory)
        finally:
            for kind, limits in own.items():
                resource.setrlimit(kind, limits)

    def poll(self, handle):
        if handle.task.job.name == "well" and not self.killed:
            for process in workers_of(handle.worker.directory.parents[1], "well"):
                if process != handle.worker.process.pid:
                    os.kill(process, signal.SIGKILL)
                    self.killed.append(process)
        return super().poll(handle)


def add_vocabulary(model, gigabytes):
    """Give a model an embedding of so many gigabytes of zeros, which take no room on the disk."""
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    config["vocab_size"] = int(gigabytes * 1e9) // (4 * hidden)
    config["tie_word_embeddings"] = True
    (model / "config.json").write_text(json.dumps(config))
    content = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data, kept = {}, content[8 + length :], b""
    for name, tensor in json.loads(content[8 : 8 + length]).items():
        if name not in ("__metadata__", "lm_head.weight", "model.embed_tokens.weight"):
            start, end = tensor["data_offsets"]
            header[name] = {**tensor, "data_offsets": [len(kept), len(kept) + end - start]}
            kept += data[start:end]
    shape = [config["vocab_size"], hidden]
    size = len(kept) + 4 * shape[0] * shape[1]
    header["model.embed_tokens.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [len(kept), size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + kept)
        file.truncate(8 + len(text) + size)


def convert_hostile(models, rows, zoo, limits):
    """Convert models where the limits are those of :class:`Hostile`; runs in a process of its own."""
    Hostile.limits.update(limits)
    jobs = resolve([str(models)], Defaults(data=str(rows), compress=SMALL))
    drive(zoo, jobs, engine=Hostile, retries=1, workers=1)
    print(len(Hostile.killed))


@pytest.mark.thorough
def test_each_fault_is_its_job_s_own(tmp_path, tiny_model, rows_file, alone):
    """Out of memory: smaller, then a failure. No room: a failure that leaves room to others. A killed stage: again."""
    for name in ("full", "hungry", "well"):
        shutil.copytree(tiny_model, tmp_path / "models" / name)
    with (tmp_path / "models" / "full" / "config.json").open("a") as file:
        file.write(" ")  # else it is a duplicate
    add_vocabulary(tmp_path / "models" / "hungry", 1.0)
    limits = {"hungry": {resource.RLIMIT_AS: alone[1] + (300 << 20)}, "full": {resource.RLIMIT_FSIZE: 20_000}}
    arguments = tmp_path / "models", rows_file, tmp_path / "zoo", limits
    assert ForkingDriver(tmp_path / "log", convert_hostile, *arguments).wait() == 0
    assert (tmp_path / "log").read_text() == "1\n"  # one stage was killed
    records = {record.job.name: record for record in Store(tmp_path / "zoo").records()}
    assert {name: [attempt.cause for attempt in record.attempts] for name, record in records.items()} == {
        "hungry": ["out of memory", "out of memory"], "full": ["disk"], "well": ["lost worker", None],
    }  # fmt: skip
    assert records["hungry"].attempts[0].message.endswith("Retrying it smaller: compress.samples 12 -> 6.")
    assert "The disk is full" in records["full"].attempts[0].message
    assert list((tmp_path / "zoo/jobs/full").glob(".*.partial")) == []
    killed = records["well"].attempts[0].message
    assert killed.startswith("The process of the stage 'emulator' was killed by SIGKILL.")
    assert records["well"].result["linears"]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_zoo_is_no_file(tmp_path, tiny_model, rows_file, options):
    (tmp_path / "file").write_text("")
    for zoo in (tmp_path / "file", tmp_path / "file" / "zoo"):
        result = run_here("convert", tiny_model, "-o", zoo, "--data", rows_file, *options)
        assert f"{tmp_path / 'file'} is not a directory. Choose another output directory." in str(result.exception)


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_zoo_is_no_model(tmp_path, tiny_model, rows_file, options):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    before = sorted(model.iterdir())
    result = run_here("convert", model, "-o", model, "--data", rows_file, *options)
    assert f"{model} is the directory of a model. Choose another place with -o." in str(result.exception)
    assert sorted(model.iterdir()) == before
