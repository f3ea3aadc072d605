"""``emloc zoo convert``."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import as_json, dry_run, print_json, progress, resumes
from emloc_core.cli.options import explicit, options
from emloc_core.cli.zoo.entries import more_entries
from emloc_core.cli.zoo.records import line, totals
from emloc_core.errors import EmlocError, validated
from emloc_core.settings import CompressSettings
from emloc_core.units import human_bytes, parse_bytes

if TYPE_CHECKING:
    from emloc_core.zoo.engines.engine import Engine
    from emloc_core.zoo.jobs.job import ZooJob
    from emloc_core.zoo.jobs.task import Demand
    from emloc_core.zoo.retry import Limits

_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@click.command("convert")
@click.argument("sources", nargs=-1, required=True)
@click.option("-o", "--output", "zoo", type=click.Path(path_type=Path), required=True, help="Directory for the zoo.")
@click.option("--data", help="Rows to calibrate on, for jobs without their own: a file, or a hub dataset.")
@click.option("--split", default="train", show_default=True, help="Split of a hub dataset.")
@click.option("--preset", help="Preset of registry entries.  [default: default]")
@more_entries
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="Where jobs run: in parallel on this machine, or on a Ray cluster.")  # fmt: skip
@click.option("--address", metavar="HOST:PORT", help="Address of a Ray cluster; also ray://HOST:PORT, or auto for this "
              "machine's cluster.  [default: start one here]")  # fmt: skip
@click.option("--storage", metavar="URL", help="Where the nodes of a cluster share inputs and outputs, such as "
              "s3://bucket/zoo, unless the zoo is on a shared disk.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Maximum jobs at a time.  [default: number of processors]")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads per job.")
@click.option("--memory", metavar="SIZE",
              help="Memory for all running jobs together.  [default: the machine's, less a headroom]")  # fmt: skip
@click.option("--time-limit", metavar="TIME", help="Time limit per attempt at a job: 90, 30min, 2h.")
@click.option("--retries", type=click.IntRange(0), default=2, show_default=True,
              help="Retries per failed job.")  # fmt: skip
@click.option("--offline", is_flag=True, help="Never download anything from the hub.")
@options(CompressSettings)
@dry_run
@as_json
@resumes
def command(
    sources: tuple[str, ...],
    zoo: Path,
    engine: str,
    address: str | None,
    storage: str | None,
    workers: int | None,
    memory: str | None,
    dry_run: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Make emulators of many models; SOURCES are registry ids or globs, directories, or files of jobs.

    A directory is a model, or contains models. A file of jobs is TOML with one [[job]] per model: model, data, ratio,
    and the sections of a recipe. A job with its own rows continues with training, correction and
    evaluation.

    A failed job never stops the others. Run the same command again to resume after an interruption: failed jobs are
    retried, and finished ones are not repeated. The exit code is 1 if a job failed.
    """
    from emloc_core.zoo.jobs.sources import Defaults, resolve
    from emloc_core.zoo.retry import Limits

    if engine == "local" and (address or storage):
        raise EmlocError("--address and --storage are for clusters.", "Add --engine ray, or leave them out.")

    budget = parse_bytes(memory) if memory else None
    time_limit = values.pop("time_limit")
    seconds = parse_seconds(time_limit) if time_limit else None
    limits = Limits(values.pop("retries"), seconds, elsewhere=storage is not None)
    settings, others = explicit(CompressSettings, values)
    validated(CompressSettings, settings, "See --help.")
    defaults = Defaults(compress=settings, **others)
    jobs = resolve(sources, defaults)
    if dry_run:
        from emloc_core.zoo.engines.local import machine_memory

        _describe(jobs, zoo, limits, budget or (machine_memory() if engine == "local" else None), as_json)
        return

    def make_engine(lock: int) -> "Engine":
        if engine == "ray":
            from emloc_core.zoo.engines.cluster import RayEngine

            return RayEngine(workers, budget, address, storage)
        from emloc_core.zoo.engines.local import LocalEngine, processors

        return LocalEngine(workers or max(1, processors() // defaults.threads), budget, [lock])

    _convert(jobs, zoo, make_engine, limits, as_json)


def _convert(
    jobs: "list[ZooJob]", zoo: Path, make_engine: "Callable[[int], Engine]", limits: Any, as_json: bool
) -> None:
    from emloc_core.zoo.convert import convert

    tried: set[str] = set()
    with progress("Planning") as advance, _reporting() as show:

        def notify(name: str, state: str, message: str) -> None:
            tried.add(name)
            show(name, state, message)

        records = convert(jobs, zoo, make_engine, limits, notify, advance)
    # A job that failed before and was not tried now is no failure of this command.
    failed = [record for record in records if record.state == "failed" and record.job.name in tried]
    if as_json:
        print_json({"zoo": str(zoo), "jobs": [record.to_dict() for record in records]})
    else:
        click.echo(totals(records))
    if failed:
        names = "; ".join(f"{record.job.name}: {line(record)}" for record in failed[:5])
        more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise EmlocError(
            f"{len(failed)} of {len(records)} jobs failed. {names}{more}",
            f"`emloc zoo status {zoo}` shows all; the same command retries them.",
        )


@contextmanager
def _reporting() -> Iterator[Callable[[str, str, str], None]]:
    """Show progress on stderr: one line per running job on a terminal, one line per event elsewhere."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    lines: dict[str, TaskID] = {}
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bars:

        def notify(name: str, state: str, message: str) -> None:
            if state == "running":
                lines[name] = bars.add_task(escape(name), total=None)
                if bars.disable:
                    console.print(f"{escape(name)}: running")
                return
            if name in lines:
                bars.remove_task(lines.pop(name))
            bars.console.print(f"{escape(name)}: {state}{f' ({escape(message)})' if message else ''}")

        yield notify


def _describe(jobs: "list[ZooJob]", zoo: Path, limits: "Limits", memory: int | None, as_json: bool) -> None:
    from emloc_core.zoo.convert import preview, require_room

    with progress("Planning") as advance:
        previews = preview(jobs, zoo, advance)
    # Duplicates and finished jobs are not tried.
    refused = {item.name: _refused(item.job, item.needs, memory) for item in previews if item.state == "to do"}
    refused = {name: reason for name, reason in refused.items() if reason}
    if as_json:
        content = [
            {"name": item.name, "state": item.state, "needs": asdict(item.needs),
             "refused": refused.get(item.name, ""), "note": item.note}
            for item in previews
        ]  # fmt: skip
        print_json({"jobs": content})
    else:
        width = max(len(item.name) for item in previews)
        for number, item in enumerate(previews, 1):
            needs = item.needs
            sizes = [
                f"{label} {'unknown' if size is None else human_bytes(size)}"
                for label, size in (("base", needs.base), ("emulator", needs.emulator), ("disk", needs.disk),
                                   ("memory", needs.memory))
            ]  # fmt: skip
            reasons = "; ".join(filter(None, (needs.reason, refused.get(item.name), item.note)))
            reason = f" ({reasons})" if reasons else ""
            click.echo(f"{number:>3}. {item.name:<{width}}  {item.state:<6}  {', '.join(sizes)}{reason}")
    needed, room = require_room(previews, zoo, limits)
    if not as_json:
        click.echo(f"disk: {human_bytes(needed)}{'' if room is None else f' of {human_bytes(room)}'}")
    if refused:
        examples = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise EmlocError(
            f"{len(refused)} of {len(previews)} jobs would fail. {examples}{more}.",
            "Give --data for those without rows, more --memory if there is more, or leave them out.",
        )


def _refused(job: "ZooJob", needs: "Demand", memory: int | None) -> str:
    """Return why a job cannot run, or an empty string if it can."""
    if job.data is None:
        return "no rows to calibrate on"
    if memory is not None and needs.memory is not None and needs.memory > memory:
        return f"it needs more than {human_bytes(memory)} of memory"
    return ""


def parse_seconds(text: str) -> float:
    """Parse a time, such as ``90``, ``90s``, ``30min``, ``2h`` or ``1.5d``; return seconds.

    Raises:
        EmlocError: it is not a time, or is zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise EmlocError(f"{text!r} is not a time.", "Write 90, 30min or 2h.")
    return float(match[1]) * _UNITS[match[2]]
