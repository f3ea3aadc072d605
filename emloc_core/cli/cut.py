"""``emloc cut``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import as_json, dry_run
from emloc_core.cli.options import given, options
from emloc_core.cli.stage import run
from emloc_core.cli.verbosity import verbosity_options
from emloc_core.requests import make_request
from emloc_core.settings import CutSettings


@click.command("cut")
@click.argument("spectra", type=click.Path(path_type=Path))
@click.option("--base", help="Model that the spectra were made from: directory or hub id.  "
              "[default: the model that they name]")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory for the emulator.")
@options(CutSettings)
@verbosity_options
@dry_run
@as_json
def command(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Cut an emulator of any ratio from SPECTRA, made by compress --keep-spectra, without calibrating again.

    Up to rounding, the result is the emulator that compress --calibration base makes at that ratio with the same
    allocator. An interrupted cut resumes where it stopped.
    """
    settings, content = given(CutSettings, options)
    run(make_request("cut", settings, **content), dry_run=dry_run, to_json=as_json)
