"""``emloc eval``."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import announce, as_json, dry_run, print_json
from emloc_core.errors import EmlocError
from emloc_core.evaluation.new_task import KINDS

if TYPE_CHECKING:
    from emloc_core.evaluation.evaluate import System

_DIRECTORY = click.Path(path_type=Path)


@click.command("eval")
@click.argument("tasks", nargs=-1, metavar="TASK...")
@click.option("--base", help="The base model: directory or hub id.")
@click.option("--emulator", type=_DIRECTORY, help="What compress made.")
@click.option("--adapter", type=_DIRECTORY, help="What train made: goes on the emulator and, uncorrected, on the base.")
@click.option("--corrected", type=_DIRECTORY, help="What correct made: goes on the base.")
@click.option("--merged", type=_DIRECTORY, help="What merge made.")
@click.option("--full-lora", type=_DIRECTORY, help="A LoRA trained on the base itself, the upper bound.")
@click.option("--system", "others", multiple=True, metavar="NAME=MODEL[+ADAPTER]", help="Any other; repeatable.")
@click.option("-o", "--output", type=_DIRECTORY, required=True, help="Directory of the results; --new-task: the file.")
@click.option("--limit", type=click.IntRange(min=1), help="Use that many rows of every task.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows at a time.")
@click.option("--chat/--no-chat", default=None, help="Use the chat template; default: where rows are chats.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of sampling and few-shot rows.")
@click.option("--new-task", type=click.Choice(KINDS), help="Write a task file for --data to -o, and evaluate nothing.")
@click.option("--data", type=_DIRECTORY, help="With --new-task: rows of yours that nothing was tuned on.")
@dry_run
@as_json
def command(
    tasks: tuple[str, ...],
    output: Path,
    others: tuple[str, ...],
    new_task: str | None,
    data: Path | None,
    dry_run: bool,
    as_json: bool,
    base: str | None,
    limit: int | None,
    **settings: Any,
) -> None:
    """Compare base, emulator and adapters on each TASK, in one table.

    A TASK is a task file of lm-eval's (--new-task writes one for your rows) or the name of a task that lm-eval brings
    along, whose data come from the hub. Each system runs in a process of its own; those that are done are kept when
    the command is interrupted.
    """
    if new_task is not None:
        _write_task(new_task, data, output)
        return
    from emloc_core.evaluation.evaluate import canonical_systems, check_adapters, evaluate, plan
    from emloc_core.report import table as report

    directories = {name: settings.pop(name) for name in ("emulator", "adapter", "corrected", "merged", "full_lora")}
    canonical = canonical_systems(base=_model(base) if base else None, **directories)
    systems = canonical + [_system(text) for text in others]
    if dry_run:
        with TemporaryDirectory() as cache_dir:  # nothing is written, not even hashes beside the output
            check_adapters(canonical, Path(cache_dir))
        _describe(plan(systems, tasks), as_json)
        return
    check_adapters(canonical, output.resolve().parent)
    results = evaluate(
        systems,
        tasks,
        output,
        limit=limit,
        progress=lambda line: click.echo(f"evaluating {line}", err=True),
        **settings,
    )
    if as_json:
        announce("eval", output, [], to_json=True)
        return
    report.print_table(results["systems"], results["metrics"])
    announce("eval", output, [report.note(results), *filter(None, [report.conclusion(results)])], to_json=False)


def _write_task(kind: str, data: Path | None, output: Path) -> None:
    from emloc_core.evaluation.new_task import write_task

    if data is None:
        raise EmlocError("--new-task needs rows to ask about.", "Add --data FILE.")
    click.echo(f"{write_task(kind, data, output)}  (read it, then: emloc eval {output} --base MODEL -o DIRECTORY)")


def _model(text: str) -> Path:
    from emloc_core.files.checkpoint import open_checkpoint

    return open_checkpoint(text).directory


def _system(text: str) -> "System":
    from emloc_core.evaluation.evaluate import System

    name, equals, place = text.partition("=")
    if not name or not equals or not place:
        raise EmlocError(f"--system {text!r} is not NAME=MODEL or NAME=MODEL+ADAPTER.", "Write it like that.")
    if Path(place).exists():  # a directory may have a + in its name
        return System(name, Path(place))
    model, _, adapter = place.partition("+")
    return System(name, _model(model), Path(adapter) if adapter else None)


def _describe(content: dict[str, Any], to_json: bool) -> None:
    if to_json:
        print_json(content)
        return
    for name, system in content["systems"].items():
        click.echo(f"{name:<16} {system['model']}" + (f" + {system['adapter']}" if system["adapter"] else ""))
    for name, path in content["tasks"].items():
        click.echo(f"{'task':<16} {name} ({path})")
