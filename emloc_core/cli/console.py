"""Progress while a stage runs, and its result as text or JSON."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import rich_click as click

from emloc_core.result import Result
from emloc_core.units import human_bytes, human_seconds

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
dry_run = click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be done, with sizes, and stop. Hashes of large files are kept for the real run.",
)


@contextmanager
def progress(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on stderr; yields a function of (what was done, number done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[what]}"))  # fmt: skip
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=None, what="")

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, what=what)

        yield advance


def announce(result: Result, lines: Iterable[str], *, to_json: bool, made_before: bool = False) -> None:
    """Print what a stage made.

    Args:
        result: its finished output.
        lines: for a person.
        to_json: print the manifest and the timing as one JSON object instead.
        made_before: an earlier run finished it, and this one did nothing.
    """
    timing = result.timing
    if to_json:
        print_json({"output": str(result), **result.manifest, "timing": timing})
        return
    for line in lines:
        click.echo(line)
    seconds, peak = timing.get("seconds", 0), timing.get("peak_rss_bytes", 0)
    when = "finished before, in " if made_before else ""
    click.echo(f"{result}  ({when}{human_seconds(seconds)}, peak memory {human_bytes(peak)})")


def print_json(content: dict[str, Any]) -> None:
    """Print JSON on stdout."""
    click.echo(json.dumps(content, indent=2, sort_keys=True))
