"""``emloc demo-zoo``."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import rich_click as click

from emloc_core.errors import EmlocError
from emloc_core.processes.lifetime import child_environment
from emloc_demo.preparation import output_option

ENGINES = ("local", "ray")


@click.command("demo-zoo")
@output_option("build/demo-zoo")
@click.option("--smollm2/--no-smollm2", default=True, show_default=True, help="SmolLM2-135M among the models.")
def command(output: Path, smollm2: bool) -> None:
    """Convert eleven small models of several families on this machine, and again on a Ray cluster of two nodes.

    One model is damaged and one is a duplicate; a mixture of experts becomes an emulator of every kind. The cluster is
    started on this machine and stopped at the end. Each zoo gets a report, and the emulators of both are compared byte
    for byte. Needs no network and no GPU, and takes a few minutes on two cores. Finished parts are kept.
    """
    from emloc_demo.zoo.models import prepare

    jobs = prepare(output, smollm2=smollm2)
    convert(jobs, output / "local", "--workers", "2")
    with two_nodes() as address:
        convert(jobs, output / "ray", "--engine", "ray", "--address", address)
    zoos = [output / engine for engine in ENGINES]
    for zoo in zoos:
        emloc("zoo", "report", str(zoo))
    click.echo(f"\n{compare(*zoos)}")


def convert(jobs: Path, zoo: Path, *argv: str) -> None:
    """Convert the file of jobs.

    Raises:
        EmlocError: not exactly the damaged model fails.
    """
    from emloc_core.zoo.state.store import Store
    from emloc_demo.zoo.models import AGAIN, BROKEN

    emloc("zoo", "convert", str(jobs), "-o", str(zoo), "--offline", *argv, codes=(0, 1))
    with closing(Store(zoo)) as store:
        states = {record.job.name: record.state for record in store.records()}
    odd = {BROKEN: "failed", AGAIN: "duplicate"}
    wrong = [f"{name} is {state}" for name, state in states.items() if state != odd.get(name, "done")]
    if wrong or not states:
        raise EmlocError(f"Not as expected: {'; '.join(wrong) or 'no jobs'}.", f"The logs in {zoo / 'logs'} say more.")
    click.echo(f"As it should be: {BROKEN} is damaged on purpose, and {AGAIN} is a copy of another.", err=True)


def emloc(*argv: str, codes: tuple[int, ...] = (0,)) -> None:
    """Run a command as a user would, and show it.

    Raises:
        EmlocError: it ended with another exit code than ``codes``.
    """
    click.echo(f"\n$ emloc {' '.join(argv)}", err=True)
    code = subprocess.run([sys.executable, "-m", "emloc_core", *argv], env=child_environment(), check=False).returncode
    if code not in codes:
        raise EmlocError(f"The command ended with exit code {code}.", "Fix what it says above, and run this again.")


@contextmanager
def two_nodes() -> Iterator[str]:
    """Start a Ray cluster of two nodes on this machine, each with a processor and half the memory; yield its address.

    Raises:
        EmlocError: Ray is missing.
    """
    from emloc_core.zoo.engines.connect import confine
    from emloc_core.zoo.engines.local import machine_memory

    confine()
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        raise EmlocError("The demo's cluster needs the package ray.", "pip install 'emloc[cluster]'") from None
    click.echo("\nstarting a Ray cluster of two nodes", err=True)
    node = {
        "num_cpus": 1,
        "memory": machine_memory() // 2,
        "object_store_memory": 80 << 20,
        "include_dashboard": False,
    }
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        yield cluster.address
    finally:
        cluster.shutdown()


def compare(first: Path, second: Path) -> str:
    """Return a table of the emulators of two zoos, by SHA-256 over their files.

    Raises:
        EmlocError: the two emulators of a job differ.
    """
    from emloc_core.units import human_bytes
    from emloc_core.zoo.state.store import Store

    lines, differing = ["| model | emulator | SHA-256 on both engines |", "| --- | ---: | --- |"], []
    with closing(Store(first)) as store:
        records = [record for record in store.records() if record.state == "done"]
    for record in records:
        name = record.job.name
        digests = [digest(zoo / "jobs" / name / "emulator") for zoo in (first, second)]
        if digests[0] != digests[1]:
            differing.append(name)
        lines.append(f"| {name} | {human_bytes(record.result['bytes']['emulator'])} | {digests[0][:16]} |")
    if differing:
        raise EmlocError(f"The engines made different emulators of {', '.join(differing)}.")
    return "\n".join([*lines, "", f"{len(records)} emulators, every file the same bytes on both engines."])


def digest(output: Path) -> str:
    """Return the SHA-256 over the names and contents of an output's files, except the timings."""
    from emloc_core.files.output import TIMING

    total = hashlib.sha256()
    for path in sorted(path for path in output.rglob("*") if path.is_file() and path.name != TIMING):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(output).as_posix()}\0{content}\n".encode())
    return total.hexdigest()
