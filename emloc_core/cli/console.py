"""Progress while a stage runs, and its result as text or JSON."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.verbosity import Verbosity, verbosity, verbosity_options
from emloc_core.files.meter import peak_memory
from emloc_core.stages.progress import Pace
from emloc_core.stages.result import Result
from emloc_core.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from emloc_core.files.job import Progress as Advance

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
dry_run = click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be done, with sizes, and stop. Hashes of large files are kept for the real run.",
)


def resumes(function: Any) -> Any:
    """Mark a command that keeps work in progress: interrupted, it says that it resumes."""
    function.resumes = True
    return function


def stage_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every stage takes: ``--quiet``, ``--verbose``, ``--dry-run`` and ``--json``. A stage resumes."""
    return verbosity_options(dry_run(as_json(resumes(function))))


push = click.option("--push", metavar="REPO", help="Upload the finished output to this private repository on the hub.")


@contextmanager
def progress(description: str, every: float = 10.0) -> Iterator["Advance"]:
    """Show progress on stderr: a bar on a terminal, elsewhere a line at most ``every`` seconds.

    Yields a function of (what was done, number done, total, loss). Quiet shows nothing, verbose a line for every item.
    """
    if verbosity() is Verbosity.QUIET:
        yield lambda *_: None
    elif sys.stderr.isatty() and verbosity() is Verbosity.NORMAL:
        with _bar(description) as advance:
            yield advance
    else:
        yield _Lines(description, 0.0 if verbosity() is Verbosity.VERBOSE else every)


@contextmanager
def working(description: str) -> Iterator[None]:
    """Show a spinner on a terminal while work of unknown length runs; elsewhere nothing."""
    if verbosity() is not Verbosity.NORMAL or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    spinner = Spinner("dots", f"{description} ...")
    # Not redirected: download bars would become one line per refresh.
    with Live(spinner, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False):
        yield


@contextmanager
def _bar(description: str) -> Iterator["Advance"]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[item]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None, item="")

        def advance(item: str, done: int, total: int, _loss: float | None = None, /) -> None:
            bar.update(task, completed=done, total=total, item=item)

        yield advance


class _Lines:
    """Progress as plain lines, for logs: how much is done, and about how long the rest will take."""

    def __init__(self, description: str, every: float) -> None:
        self._description, self._every = description, every
        self._start = self._last = time.monotonic()
        self._pace = Pace()

    def __call__(self, item: str, done: int, total: int, _loss: float | None = None, /) -> None:
        now = time.monotonic()
        elapsed = now - self._start
        remaining = self._pace.remaining(elapsed, done, total)
        if now - self._last < self._every and done < total:
            return
        self._last = now
        suffix = f", about {human_seconds(remaining)} left" if done < total and remaining is not None else ""
        label = f" ({item})" if item else ""
        click.echo(f"{self._description}: {done} of {total}{label}, {human_seconds(elapsed)}{suffix}", err=True)


def announce(result: Result, lines: Iterable[str], *, to_json: bool, made_before: bool = False) -> None:
    """Print what a stage made.

    Args:
        lines: text for a person.
        to_json: print the manifest and the timing as one JSON object instead.
        made_before: an earlier run finished it, and this one did nothing.
    """
    timing = result.timing
    if to_json:
        print_json({"output": str(result), **result.manifest, "timing": timing})
        return
    if verbosity() is Verbosity.QUIET:
        click.echo(str(result))
        return
    for line in lines:
        click.echo(line)
    seconds, peak = timing.get("seconds", 0), peak_memory(timing) or 0
    when = "finished earlier, in " if made_before else ""
    click.echo(f"{result}  ({when}{human_seconds(seconds)}, peak memory {human_bytes(peak)})")


def print_table(table: "Table") -> None:
    """Print a table on stdout; rich would fold it to 80 columns in a file or a pipe."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def print_json(content: dict[str, Any]) -> None:
    """Print JSON on stdout."""
    click.echo(json.dumps(content, indent=2, sort_keys=True))
