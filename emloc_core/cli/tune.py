"""``emloc tune``."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rich_click as click

from emloc_core.cli.console import stage_options
from emloc_core.cli.options import (
    TRAIN_FLAGS,
    data,
    evaluated,
    evaluation,
    explicit,
    headroom,
    options,
    output,
    skip,
    split,
)
from emloc_core.cli.recipes import planning, reporting, show, show_plan
from emloc_core.cli.verbosity import Verbosity, verbosity
from emloc_core.errors import validated
from emloc_core.settings import FREE, TrainSettings


@click.command("tune")
@click.argument("model")
@data(required=True)
@output("Directory for all outputs.")
@click.option("--memory", metavar="SIZE", default=FREE, help="Memory to tune in, such as 24GiB.  [default: "
              "the GPU's free memory, or the machine's without one]")  # fmt: skip
@headroom
@click.option("--merge", is_flag=True, help="Write the merged model too.")
@split
@skip
@evaluation(of_emulator=False)
@click.option("--paper", is_flag=True, help="Make the emulator as in the paper, for reference: low-rank factors, even "
              "where an ordinary LoRA fits.")  # fmt: skip
@options(TrainSettings, TRAIN_FLAGS, skip=["extra"])
@stage_options
def command(output: Path, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Tune MODEL, a directory or hub id, on your rows in the memory available.

    It plans, says what it will do and why, and does it: an ordinary LoRA if that fits; otherwise the best emulator, a
    LoRA on it, the correction, and exact steps where they pay off. OUTPUT gets all of it, with a report page, the
    answers to five held-out rows before and after, and recipe.toml, which you can edit and run with emloc run. Run the
    same command again to resume.
    """
    from emloc_core.recipe.tune import Tune

    tuning, others = explicit(TrainSettings, values)
    settings = validated(TrainSettings, tuning, "See `emloc tune --help`.")
    rows, others = evaluated(others)
    tune = Tune(output=output, settings=settings, evaluation=rows, **others)
    recipe = tune.started()
    if recipe:
        click.echo(f"{output / 'recipe.toml'} exists: resuming that run.", err=True)
    if dry_run:
        with planning(), TemporaryDirectory() as directory:
            test = []
            if recipe is None:
                recipe, lines = tune.plan()
                for line in lines:
                    click.echo(line, err=as_json)
                test = [tune.hold_out(Path(directory))]
            show_plan(recipe, as_json, test)
        return
    loud = verbosity() is not Verbosity.QUIET
    results = tune.run(tell=lambda line: click.echo(line, err=True) if loud else None, **reporting())
    show(results, output, as_json)
