"""``emloc correct``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import as_json, dry_run
from emloc_core.cli.options import adapter_on_base, device, given, options
from emloc_core.cli.stage import run
from emloc_core.requests import make_request
from emloc_core.settings import CorrectSettings


@click.command("correct")
@adapter_on_base("The model that the emulator was made from", "Directory of the result.")
@options(CorrectSettings)
@click.option("--emulator", type=click.Path(path_type=Path), help="Where the emulator is, if it was moved.")
@click.option("--selection", type=click.Path(path_type=Path), help="Other rows for --clamp auto to compare on.")
@device
@dry_run
@as_json
def command(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Correct the LoRA in ADAPTER, which was trained on an emulator, for the base model.

    ADAPTER is left as it was; the result is a plain PEFT LoRA for the base.
    """
    settings, content = given(CorrectSettings, options)
    run(make_request("correct", settings, **content), dry_run=dry_run, to_json=as_json)
