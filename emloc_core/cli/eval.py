"""``emloc eval``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import stage_options
from emloc_core.cli.following import join
from emloc_core.cli.options import named_options
from emloc_core.cli.stage import run
from emloc_core.errors import EmlocError
from emloc_core.evaluation.new_task import KINDS
from emloc_core.requests import System, make_request

_DIRECTORY = click.Path(path_type=Path)
_SYSTEMS = ("base", "emulator", "adapter", "corrected", "polished", "merged", "full_lora")


@click.command("eval")
@click.argument("tasks", nargs=-1, metavar="TASK...")
@click.option("--base", help="The base model: directory or hub id.")
@click.option("--emulator", help="The emulator, from compress.")
@click.option("--adapter", type=_DIRECTORY, help="The LoRA, from train: used on the emulator and, uncorrected, on the "
              "base.")  # fmt: skip
@click.option("--corrected", type=_DIRECTORY, help="The corrected LoRA, from correct: used on the base.")
@click.option("--polished", type=_DIRECTORY, help="The polished LoRA, from polish: used on the base.")
@click.option("--merged", help="The merged model, from merge.")
@click.option("--full-lora", type=_DIRECTORY, help="A LoRA trained on the base itself, the upper bound.")
@click.option("--system", "others", multiple=True, metavar="NAME=MODEL[+ADAPTER]",
              help="Another system to compare; repeatable.")  # fmt: skip
@click.option("-o", "--output", type=_DIRECTORY, required=True,
              help="Directory for the results; with --new-task, the file to write.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Use only this many rows of each task.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Rows per batch. Halved where memory runs out.",
)
@click.option("--chat/--no-chat", default=None,
              help="Use the chat template.  [default: only if a task's rows are conversations]")  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed for sampling and few-shot examples."
)
@click.option(
    "--new-task", type=click.Choice(KINDS), help="Write a task file for --data to -o, without evaluating anything."
)
@click.option("--data", type=_DIRECTORY, help="With --new-task: held-out rows, never used for tuning.")
@stage_options
def command(
    new_task: str | None, data: Path | None, others: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Compare base, emulator and adapters on each TASK, in one table.

    A TASK is an lm-eval task file (--new-task writes one for your rows) or the name of a task bundled with lm-eval,
    whose data come from the hub. Each system runs in its own process. Run the same command again after an interruption:
    finished systems are kept.
    """
    if new_task is not None:
        if named_options() - {"new_task", "data", "output"}:
            raise EmlocError("--new-task only writes a task file.", "Give only --data and -o with it.")
        _write_task(new_task, data, options["output"])
        return
    if data is not None:
        raise EmlocError(
            "--data has no effect without --new-task: a task file names its own rows.", "Leave out --data."
        )
    from emloc_core.evaluation.evaluate import canonical_systems

    canonical = canonical_systems(**{name: options.pop(name) for name in _SYSTEMS})
    systems = (*canonical, *map(_system, others))
    run(make_request("eval", systems=systems, **options), dry_run=dry_run, to_json=as_json)


def _write_task(kind: str, data: Path | None, output: Path) -> None:
    from emloc_core.evaluation.new_task import write_task

    if data is None:
        raise EmlocError("--new-task needs rows.", "Add --data FILE.")
    following = join("eval", output, "--base", "MODEL", "-o", "DIRECTORY")
    click.echo(f"{write_task(kind, data, output)}  (read it, then: {following})")


def _system(text: str) -> System:
    name, equals, target = text.partition("=")
    if not name or not equals or not target:
        raise EmlocError(f"--system {text!r} is not NAME=MODEL or NAME=MODEL+ADAPTER.", "Correct it.")
    parts = target.split("+")
    splits = [("+".join(parts[:count]), "+".join(parts[count:])) for count in range(1, len(parts))]
    if Path(target).exists() or not splits:  # a directory may have a + in its name
        return System(name=name, model=target)
    # The first of those with the most existing paths.
    model, adapter = max(splits, key=lambda split: sum(bool(path) and Path(path).exists() for path in split))
    return System(name=name, model=model, adapter=Path(adapter) if adapter else None)
