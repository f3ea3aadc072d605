"""Zoos of real jobs whose stages, workers, drivers and nodes are killed at random moments, on a busy machine.

However often that happens, every job is done, no output is made twice, and all bytes are those of a zoo left alone.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from emloc_llama import LLAMA
from support.driver import ForkingDriver
from support.models import save_tiny_model
from support.rows import example_rows, write_jsonl

from chaos.results import Result, Verdict
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.output import TIMING
from emloc_core.zoo.convert import convert
from emloc_core.zoo.engines.local import LocalEngine
from emloc_core.zoo.jobs.sources import Defaults, resolve
from emloc_core.zoo.retry import Limits
from emloc_core.zoo.state.store import Store

_JOB = """
[[job]]
name = "job-{number}"
model = "model"
data = "rows.jsonl"
ratio = 0.{number}
compress = {{ samples = 6, selection = 3 }}
train = {{ steps = 2, save_steps = 1, logging_steps = 2, lora_rank = 2, batch_size = 2, bf16 = false }}
correct = {{ clamp = 1 }}
merge = true
"""
_HOST = {"num_cpus": 1, "memory": 4 << 30, "object_store_memory": 80 << 20, "include_dashboard": False}
_LOOK = 0.01  # seconds between checks of what runs and what is there
_HANGS = 300.0  # seconds in which a driver that is left alone has to finish a stage


class Driver(Protocol):
    """A process that converts a zoo."""

    pid: int

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""

    def kill(self) -> None:
        """Kill it, and wait."""


@dataclass(frozen=True)
class Engine:
    """Where jobs run, and what can be lost there.

    Attributes:
        name: for the table.
        start: starts a driver on a file of jobs and a zoo.
        pauses: the shortest and the longest time between kills, in seconds.
        lose_node: takes a node away, and adds another one.
    """

    name: str
    start: Callable[[Path, Path], Driver]
    pauses: tuple[float, float]
    lose_node: Callable[[], None] | None = None


def campaign(directory: Path, *, seconds: float, jobs: int = 3, ray: bool = True, seed: int = 0) -> list[Result]:
    """Disturb zoos until the time is over, at least one on each engine.

    Args:
        directory: an empty one.
        seconds: begin no other zoo after that.
        jobs: in a zoo, up to 8: compressed, trained, corrected and merged.
        ray: also on a cluster of two nodes on this machine.
        seed: for what is killed, and when.
    """
    end, draw = time.monotonic() + seconds, random.Random(seed)
    file = _prepare(directory, jobs)
    local = Engine("local", _drive_here, (0.02, 0.8))
    alone = _Zoo(file, local)
    alone.run(draw, most=0)
    expected, results = alone.outputs(), []
    if alone.problems:
        return [Result("zoo left alone", "local", Verdict.WRONG, "; ".join(alone.problems))]
    alone.put_away("alone")
    with _load(), _engines(local, ray=ray) as engines:
        number = 0
        while number < len(engines) or time.monotonic() < end:
            zoo = _Zoo(file, engines[number % len(engines)])
            zoo.run(draw, most=4 * jobs)
            results += zoo.results(expected, f"zoo {number} of seed {seed}")
            zoo.put_away(f"zoo-{number}")
            number += 1
    return results


def _drive_here(file: Path, zoo: Path) -> Driver:
    return ForkingDriver(zoo.with_suffix(".log"), _convert, file, zoo)


def _convert(file: Path, zoo: Path) -> None:
    limits = Limits(retries=100, backoff=0.01)
    convert(resolve([str(file)], Defaults(offline=True)), zoo, lambda lock: LocalEngine(2, inherited=[lock]), limits)


@dataclass
class _Zoo:
    """A zoo, what was done to it, and what was found wrong with it."""

    file: Path
    engine: Engine
    lost: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _seen: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """The same for all: what is made from an output holds a hash that depends on where the output is."""
        return self.file.with_name("zoo")

    def put_away(self, name: str) -> None:
        """Make room for the next one."""
        self.directory.rename(self.directory.with_name(name))

    def run(self, draw: random.Random, most: int) -> None:
        """Convert it, killing something now and then, at most so many times, until a driver ends by itself."""
        driver = self.engine.start(self.file, self.directory)
        next_kill, calm_since = time.monotonic() + draw.uniform(*self.engine.pauses), time.monotonic()
        while (code := driver.poll()) is None:
            time.sleep(_LOOK)
            now = time.monotonic()
            if self._watch():
                calm_since = now
            if len(self.lost) < most and now > next_kill:
                if self._lose(draw) == "driver":
                    driver.kill()
                    driver = self.engine.start(self.file, self.directory)
                next_kill = time.monotonic() + draw.uniform(*self.engine.pauses)
                calm_since = time.monotonic()
            elif now - calm_since > _HANGS:
                driver.kill()
                self.problems.append("the driver hangs")
        if code:
            self.problems.append(f"the driver ended with exit code {code}")
        if self._processes():
            self.problems.append("a worker outlives its driver")

    def results(self, expected: dict[str, bytes], case: str) -> list[Result]:
        """Return a result for each thing that was lost."""
        outputs = self.outputs()
        self.problems += [f"{name} differs or is missing" for name in expected if outputs.get(name) != expected[name]]
        self.problems += [f"{name} is left behind" for name in outputs.keys() - expected.keys()]
        with closing(Store(self.directory)) as store:
            for record in store.records():
                causes = [attempt.cause for attempt in record.attempts]
                if record.state != "done" or causes.count(None) != 1 or causes[-1] is not None:
                    self.problems.append(f"{record.job.name} is {record.state} after {causes}")
                odd = set(causes) - {None, "lost worker", "interrupted"}
                if odd:
                    messages = [attempt.message for attempt in record.attempts if attempt.cause in odd]
                    self.problems.append(f"{record.job.name} failed otherwise: {messages}")
        verdict = Verdict.WRONG if self.problems else Verdict.RESUMED
        why = "; ".join(self.problems[:6])
        return [Result(f"zoo, {self.engine.name}: a {kind} lost", case, verdict, why) for kind in self.lost]

    def outputs(self) -> dict[str, bytes]:
        """Return the contents of all outputs by path, without timings and reports of attempts."""
        jobs, contents = self.directory / "jobs", {}
        for path in jobs.rglob("*"):
            name = path.relative_to(jobs).as_posix()
            if path.is_file() and path.name != TIMING and name.count("/") > 1:
                contents[name] = path.read_bytes()
        return contents

    def _watch(self) -> bool:
        """Return whether there is a new output, and notice one that is made again."""
        before = len(self._seen)
        for manifest in (self.directory / "jobs").glob(f"*/*/{MANIFEST}"):
            if manifest.parent.name.startswith("."):  # not published yet
                continue
            status = manifest.stat()
            stamp = status.st_ino, status.st_mtime_ns
            if self._seen.setdefault(manifest, stamp) != stamp:
                self.problems.append(f"{manifest.parent.parent.name}/{manifest.parent.name} was made twice")
                self._seen[manifest] = stamp
        return len(self._seen) > before

    def _lose(self, draw: random.Random) -> str:
        """Kill something that is at work; return its kind, empty where there is nothing yet."""
        kind = draw.choice(
            ["stage", "stage", "worker", "worker", "driver", *(["node"] if self.engine.lose_node else [])]
        )
        processes = self._processes()
        if not processes:
            return ""
        if kind == "node" and self.engine.lose_node:
            self.engine.lose_node()
        elif kind in ("stage", "worker"):
            # A worker is the leader of a group; its stage is a fork of it.
            fitting = [process for process in processes if (_group(process) == process.pid) == (kind == "worker")]
            if not fitting:
                return ""
            with _may_be_gone():
                draw.choice(fitting).kill()
        self.lost.append(kind)
        return kind

    def _processes(self) -> list[psutil.Process]:
        """Return the workers of this zoo and their stages: they run in the directory of its outputs."""
        processes, jobs = [], self.directory / "jobs"
        for process in psutil.process_iter():
            with _may_be_gone():
                if Path(process.cwd()).is_relative_to(jobs) and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
        return processes


@contextmanager
def _may_be_gone() -> Iterator[None]:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        yield


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return 0


def _prepare(directory: Path, jobs: int) -> Path:
    """Write a model, rows, and a file of jobs that differ in their ratios."""
    save_tiny_model(LLAMA.tiny_configs[0], directory / "model")
    write_jsonl(directory / "rows.jsonl", example_rows())
    file = directory / "zoo.toml"
    file.write_text("".join(_JOB.format(number=2 + number) for number in range(jobs)), encoding="utf-8")
    return file


@contextmanager
def _engines(local: Engine, *, ray: bool) -> Iterator[list[Engine]]:
    """Yield the engines; a cluster lives as long."""
    if not ray:
        yield [local]
        return
    from emloc_core.zoo.engines.connect import confine

    confine()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=_HOST)
    nodes: list[Any] = [cluster.add_node(**_HOST)]

    def lose_node() -> None:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        nodes.append(cluster.add_node(**_HOST))

    def start(file: Path, zoo: Path) -> Driver:
        return _CommandLine(file, zoo, "--engine", "ray", "--address", cluster.address)

    try:
        yield [local, Engine("Ray", start, (1.0, 12.0), lose_node)]
    finally:
        cluster.shutdown()


class _CommandLine(subprocess.Popen[bytes]):
    """``emloc zoo convert``, as a user starts it."""

    def __init__(self, file: Path, zoo: Path, *argv: str) -> None:
        command = [sys.executable, "-m", "emloc_core", "zoo", "convert", str(file), "-o", str(zoo)]
        options = ["--offline", "--workers", "2", "--retries", "100", *argv]
        with zoo.with_suffix(".log").open("ab") as log:
            super().__init__([*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        super().kill()
        self.wait()


@contextmanager
def _load() -> Iterator[None]:
    """Keep a processor busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinner:
        try:
            yield
        finally:
            spinner.kill()
