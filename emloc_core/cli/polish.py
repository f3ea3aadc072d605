"""``emloc polish``."""

from typing import Any

import rich_click as click

from emloc_core.cli.console import push, stage_options
from emloc_core.cli.options import TRAIN_FLAGS, adapter_on_base, evaluated, evaluation, explicit, options, pairs, rows
from emloc_core.cli.stage import run
from emloc_core.requests import make_request
from emloc_core.settings import ExactSettings, PolishSettings


@click.command("polish")
@adapter_on_base("Model that the adapter is for", "Directory for the polished adapter.")
@rows
@evaluation(of_emulator=False)
@options(PolishSettings, TRAIN_FLAGS, skip=["extra"])
@options(ExactSettings)
@push
@stage_options
def command(push: str | None, dry_run: bool, as_json: bool, extra: tuple[str, ...], **options: Any) -> None:
    """Train ADAPTER for a few exact steps on the base itself, in the memory of a few blocks.

    ADAPTER comes from correct, train or PEFT, and is not changed. The base is read block by block, twice per step, no
    matter how many rows a step has. Run the same command again to resume an interrupted run at its last checkpoint. For
    several GPUs: accelerate launch -m emloc_core polish ...
    """
    settings, content = explicit(PolishSettings, options)
    limits, content = explicit(ExactSettings, content)
    evaluation_rows, content = evaluated(content)
    request = make_request(
        "polish", {**settings, "extra": pairs(extra)}, limits=limits, evaluation=evaluation_rows, **content
    )
    run(request, dry_run=dry_run, to_json=as_json, push=push)
