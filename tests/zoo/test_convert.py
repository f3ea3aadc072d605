"""Real conversions of tiny models: whole, damaged, without memory, without room, killed; nothing lost or done twice."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys

import pytest
from processes import drive, files, is_gone, until, workers_of

from emloc_core.zoo.job import Job
from emloc_core.zoo.local import LocalEngine
from emloc_core.zoo.sources import Defaults, resolve
from emloc_core.zoo.store import Store

SMALL = {"samples": 12, "selection": 6}
OPTIONS = ["--samples", "12", "--selection", "6"]


def emloc(*argv, check=True, **settings):
    """Run a command of the zoo; return the process, with what it printed."""
    command = [sys.executable, "-m", "emloc_core", "zoo", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert not check or done.returncode == 0, done.stderr
    return done


def by_name(done):
    return {job["name"]: job for job in json.loads(done.stdout)["jobs"]}


@pytest.fixture(scope="module")
def place(tiny_model, rows_file, tmp_path_factory):
    """Models: a whole one, its copy, and one whose shard was cut short; and a file of jobs beside them."""
    root = tmp_path_factory.mktemp("zoo")
    for name in ("copy", "cut", "first"):
        shutil.copytree(tiny_model, root / "models" / name)
    weights = root / "models" / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copy(rows_file, root / "rows.jsonl")
    (root / "jobs.toml").write_text(
        '[[job]]\nname = "whole-way"\nmodel = "models/first"\ndata = "rows.jsonl"\nratio = 0.5\nmerge = true\n'
        "compress = { samples = 12, selection = 6 }\n"
        "train = { steps = 2, batch_size = 2, bf16 = false }\ncorrect = { clamp = 3 }\n"
    )
    return root


@pytest.fixture(scope="module")
def converted(place):
    """All of them converted by the command, which fails because one of them does."""
    sources = [place / "jobs.toml", place / "models"]
    return emloc("convert", *sources, "-o", place / "zoo", "--data", place / "rows.jsonl", *OPTIONS, "--json",
                 "--workers", "2", check=False)  # fmt: skip


@pytest.fixture(scope="module")
def alone(tiny_model, rows_file, tmp_path_factory):
    """An emulator made by the command alone with one thread, and the address space that this took, in bytes."""
    script = (
        "import sys; from emloc_core.cli import cli; cli.main(sys.argv[1:], standalone_mode=False);"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmPeak')).split()[1])"
    )
    output = tmp_path_factory.mktemp("alone") / "emulator"
    argv = ["compress", str(tiny_model), "--data", str(rows_file), "-o", str(output), *OPTIONS]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *argv], capture_output=True, text=True, check=True, env={**os.environ, **threads}
    )
    return output, int(done.stdout.splitlines()[-1]) << 10


def contents(directory):
    """Return the contents by name of what two runs have in common."""
    return {name: content for name, (content, *_) in files(directory).items() if name != "timing.json"}


def test_one_failure_stops_nothing_and_is_said(converted, place):
    assert converted.returncode == 1
    assert "1 of 4 jobs failed. cut: bad input: " in converted.stderr
    jobs = by_name(converted)
    assert {name: job["state"] for name, job in jobs.items()} == {
        "whole-way": "done", "copy": "done", "cut": "failed", "first": "duplicate",
    }  # fmt: skip
    assert jobs["first"]["duplicate_of"] == "copy"
    (attempt,) = jobs["cut"]["attempts"]  # another try would not mend it
    assert "model.safetensors" in attempt["message"]
    assert attempt["message"] in (place / "zoo" / attempt["log"]).read_text()


def test_a_result_has_sizes_errors_time_and_memory(converted):
    result = by_name(converted)["whole-way"]["result"]
    assert result["ratio"] == 0.5
    assert 0 < result["bytes"]["emulator"] < result["bytes"]["base"]
    assert list(result["stages"]) == ["adapter", "corrected", "emulator", "merged"]
    assert all(stage["seconds"] > 0 and stage["peak_rss_bytes"] > 1e7 for stage in result["stages"].values())
    assert len(result["linears"]) == 21
    assert all(0 < linear["relative_error"] < 1 for linear in result["linears"])
    assert result["correction"]


@pytest.mark.usefixtures("converted")
def test_an_emulator_is_that_of_the_command_alone(place, alone):
    assert contents(place / "zoo/jobs/copy/emulator") == contents(alone[0])


@pytest.mark.usefixtures("converted")
def test_again_nothing_is_done_twice_and_what_was_mended_goes_on(place):
    zoo = place / "zoo"
    before = {path: files(path) for path in zoo.glob("jobs/*/*") if path.is_dir()}
    assert len(before) == 5
    shutil.copytree(place / "models" / "first", place / "models" / "cut", dirs_exist_ok=True)
    config = place / "models" / "cut" / "config.json"
    config.write_text(config.read_text() + " ")  # else it is a duplicate too
    options = ["-o", zoo, "--data", place / "rows.jsonl", *OPTIONS, "--json"]
    again = emloc("convert", place / "jobs.toml", place / "models", *options)
    assert {path: files(path) for path in before} == before
    jobs = by_name(again)
    assert {name: [attempt["cause"] for attempt in job["attempts"]] for name, job in jobs.items()} == {
        "whole-way": [None], "copy": [None], "cut": ["bad input", None], "first": [],
    }  # fmt: skip
    status = emloc("status", zoo)
    assert "4 jobs: 3 done, 1 duplicate" in status.stdout
    assert by_name(emloc("status", zoo, "--json")) == jobs


def test_a_dry_run_makes_nothing_and_refuses_what_the_disk_cannot_hold(place, tmp_path):
    zoo = tmp_path / "zoo"
    command = ["convert", place / "models" / "first", place / "models" / "copy", "-o", zoo, *OPTIONS, "--data",
               place / "rows.jsonl", "--dry-run"]  # fmt: skip
    done = emloc(*command)
    assert "  1. first  to do" in done.stdout
    assert "the same as first" in done.stdout
    assert "time unknown" in done.stdout
    refused = emloc(*command, "--disk", "1MB", check=False)
    assert refused.returncode == 1
    assert "The jobs write" in refused.stderr
    assert not zoo.exists()


def test_a_dry_run_tells_time_by_what_was_done(converted, place):
    done = emloc("convert", place / "models" / "first", "-o", place / "zoo", "--data", place / "rows.jsonl", "--ratio",
                 "0.4", "--dry-run", "--json", *OPTIONS)  # fmt: skip
    (job,) = json.loads(done.stdout)["jobs"]
    took = by_name(converted)["copy"]["result"]["stages"]["emulator"]["seconds"]
    assert job["state"] == "to do"
    assert job["seconds"] == pytest.approx(took, rel=5)
    assert job["needs"]["emulator"] < job["needs"]["base"]


def test_offline_and_rowless_jobs_are_bad_input(tmp_path, tiny_model):
    (tmp_path / "jobs.toml").write_text('[[job]]\nmodel = "organisation/not-here"\ndata = "organisation/rows"\n')
    jobs = resolve([str(tmp_path / "jobs.toml"), str(tiny_model)], Defaults(offline=True))
    records = drive(tmp_path / "zoo", jobs)
    for record in records.values():
        assert [attempt.cause for attempt in record.attempts] == ["bad input"]
    assert "has no rows to calibrate on" in records["tiny-llama"].attempts[0].message


class Limited(LocalEngine):
    """The local engine, on a machine with too little for the jobs "hungry" and "full": limits of the kernel."""

    limits: dict = {}  # noqa: RUF012

    def start(self, task, directory):
        handle = super().start(task, directory)
        for kind, size in self.limits.get(task.job.name, {}).items():
            resource.prlimit(handle.process.pid, kind, (size, size))
        return handle


def add_vocabulary(model, gigabytes):
    """Give a model an embedding of so many gigabytes of zeros, which take no room on the disk."""
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    config["vocab_size"] = int(gigabytes * 1e9) // (4 * hidden)
    config["tie_word_embeddings"] = True
    (model / "config.json").write_text(json.dumps(config))
    content = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header.pop("lm_head.weight", None)
    shape = [config["vocab_size"], hidden]
    header["model.embed_tokens.weight"] = {
        "dtype": "F32",
        "shape": shape,
        "data_offsets": [end, end + shape[0] * hidden * 4],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + content[8 + length :])
        file.truncate(8 + len(text) + end + shape[0] * hidden * 4)


def test_without_memory_smaller_without_room_not_and_the_others_finish(
    tmp_path, tiny_model, rows_file, alone, monkeypatch
):
    for name in ("full", "hungry", "well"):
        shutil.copytree(tiny_model, tmp_path / "models" / name)
    for name in ("full", "well"):
        config = tmp_path / "models" / name / "config.json"
        config.write_text(config.read_text() + "\n" * (name == "full"))  # else one is the other's duplicate
    add_vocabulary(tmp_path / "models" / "hungry", 0.5)
    limits = {"hungry": {resource.RLIMIT_AS: alone[1] + (300 << 20)}, "full": {resource.RLIMIT_FSIZE: 20_000}}
    monkeypatch.setattr(Limited, "limits", limits)
    jobs = resolve([str(tmp_path / "models")], Defaults(data=str(rows_file), compress=SMALL))
    zoo = tmp_path / "zoo"
    records = drive(zoo, jobs, engine=Limited, retries=1)
    first, second = records["hungry"].attempts
    assert (first.cause, second.cause) == ("out of memory", "out of memory")
    assert first.message.endswith("Again smaller: compress.samples 12 -> 6.")
    (attempt,) = records["full"].attempts
    assert (attempt.cause, records["full"].state) == ("disk", "failed")
    assert "The disk is full" in attempt.message
    assert list((zoo / "jobs" / "full").glob(".*.partial")) == []  # others can have the room
    assert records["well"].state == "done"
    again = drive(zoo, [job for job in jobs if job.name == "full"])
    assert [attempt.cause for attempt in again["full"].attempts] == ["disk", None]


def test_killed_at_work_the_next_driver_finishes_with_the_same_bytes(tmp_path, tiny_model, rows_file, alone):
    zoo = tmp_path / "zoo"
    argv = ["convert", tiny_model, "-o", zoo, "--data", rows_file, *OPTIONS]
    command = [sys.executable, "-m", "emloc_core", "zoo", *map(str, argv)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        workers = until(lambda: len(found := workers_of(zoo, "tiny-llama")) == 2 and found)  # the worker and its stage
        first.send_signal(signal.SIGKILL)
        first.wait()
        until(lambda: all(map(is_gone, workers)))
    finally:
        first.kill()
    (record,) = Store(zoo).records()
    assert record.state == "interrupted"
    emloc(*argv)
    (record,) = Store(zoo).records()
    assert [attempt.cause for attempt in record.attempts] == ["interrupted", None]
    assert contents(zoo / "jobs/tiny-llama/emulator") == contents(alone[0])


def test_a_killed_stage_is_a_lost_worker(tmp_path, tiny_model, rows_file):
    killed = []

    def kill(process):
        os.kill(process, signal.SIGKILL)
        killed.append(process)

    class Watched(LocalEngine):
        def poll(self, handle):
            stage = [each for each in workers_of(tmp_path, handle.task.job.name) if each != handle.process.pid]
            if stage and not killed:
                kill(stage[0])
            return super().poll(handle)

    job = Job(name="a", model=str(tiny_model), data=str(rows_file), compress=SMALL)
    records = drive(tmp_path, [job], engine=Watched)
    assert [attempt.cause for attempt in records["a"].attempts] == ["lost worker", None]
    assert records["a"].attempts[0].message.startswith("The process of the stage 'emulator' was ended by SIGKILL.")
