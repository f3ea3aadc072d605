"""``emloc train``."""

from typing import Any

import rich_click as click

from emloc_core.cli.console import push, stage_options
from emloc_core.cli.options import TRAIN_FLAGS, evaluated, evaluation, explicit, options, output, pairs, rows
from emloc_core.cli.stage import run
from emloc_core.requests import make_request
from emloc_core.settings import ExactSettings, TrainSettings


@click.command("train")
@click.argument("model")
@rows
@output("Directory for the adapter.")
@evaluation(of_emulator=True)
@options(TrainSettings, TRAIN_FLAGS, skip=["extra"])
@click.option(
    "--exact",
    is_flag=True,
    help="Read MODEL, an ordinary model or an emulator, block by block, so that it need not fit in memory.",
)
@options(ExactSettings, parent="--exact")
@push
@stage_options
def command(push: str | None, dry_run: bool, as_json: bool, extra: tuple[str, ...], **options: Any) -> None:
    """Train a LoRA with TRL on MODEL, an emulator (or an ordinary model, as the upper bound).

    Rows that the emulator keeps for calibration and selection are left out, recognised by their content. Run the same
    command again to resume an interrupted run at its last checkpoint. For several GPUs:
    accelerate launch -m emloc_core train ...
    """
    settings, content = explicit(TrainSettings, options)
    limits, content = explicit(ExactSettings, content)
    evaluation_rows, content = evaluated(content)
    request = make_request(
        "train", {**settings, "extra": pairs(extra)}, limits=limits, evaluation=evaluation_rows, **content
    )
    run(request, dry_run=dry_run, to_json=as_json, push=push)
