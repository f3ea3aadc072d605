"""``emloc correct``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import push, stage_options
from emloc_core.cli.options import adapter_on_base, device, explicit, options
from emloc_core.cli.stage import run
from emloc_core.requests import make_request
from emloc_core.settings import CorrectSettings


@click.command("correct")
@adapter_on_base("Model that the emulator was made from", "Directory for the corrected LoRA.")
@options(CorrectSettings)
@click.option("--emulator", type=click.Path(path_type=Path), help="Directory of the emulator, if it has moved.")
@click.option("--selection-data", type=click.Path(path_type=Path), help="Other rows for --clamp auto to choose on.")
@device
@push
@stage_options
def command(push: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Correct the LoRA in ADAPTER, trained on an emulator, for use on the base model.

    ADAPTER is not changed; the result is an ordinary PEFT LoRA for the base.
    """
    settings, content = explicit(CorrectSettings, options)
    run(make_request("correct", settings, **content), dry_run=dry_run, to_json=as_json, push=push)
