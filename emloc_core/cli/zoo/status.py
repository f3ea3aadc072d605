"""``emloc zoo status``."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.report.table import human_bytes, human_seconds

if TYPE_CHECKING:
    from emloc_core.zoo.store import JobRecord


@click.command("status")
@click.argument("zoo", type=click.Path(path_type=Path))
@as_json
def command(zoo: Path, as_json: bool) -> None:
    """Say how far each job of ZOO is, also while it is being converted."""
    from emloc_core.zoo.store import Store

    records = Store(zoo).records()
    if as_json:
        print_json({"jobs": [record.to_dict() for record in records]})
        return
    width = max((len(record.job.name) for record in records), default=0)
    for record in records:
        click.echo(f"{record.job.name:<{width}}  {record.state:<11}  {line(record)}".rstrip())
    click.echo(totals(records))


def line(record: "JobRecord") -> str:
    """Return what there is to say of a job behind its state."""
    if record.state == "duplicate":
        return f"the same as {record.duplicate_of}"
    if not record.attempts:
        return ""
    last = record.attempts[-1]
    if record.state == "done" and "bytes" in record.result:
        sizes = record.result["bytes"]
        return f"{human_bytes(sizes['base'])} -> {human_bytes(sizes['emulator'])} in {human_seconds(last.seconds or 0)}"
    if record.state in ("running", "interrupted"):
        return f"attempt {last.number}, {last.log}"
    return f"{last.cause}: {last.message} ({last.log})" if last.cause else ""


def totals(records: "list[JobRecord]") -> str:
    """Return how many jobs there are in each state."""
    if not records:
        return "no jobs yet"  # they are planned first
    counts = Counter(record.state for record in records)
    return f"{len(records)} jobs: " + ", ".join(f"{count} {state}" for state, count in counts.items())
