"""``emloc import``."""

from typing import Any

import rich_click as click

from emloc_core.cli.console import stage_options
from emloc_core.cli.options import output
from emloc_core.cli.stage import run
from emloc_core.requests import make_request


@click.command("import")
@click.argument("source")
@output("Directory for the checkpoint.")
@stage_options
def command(dry_run: bool, as_json: bool, **content: Any) -> None:
    """Convert SOURCE, a directory or hub id, to the layout of transformers' own classes, for the other commands.

    It is for checkpoints that come with their own code, in a layout that an installed plugin reads. That code is never
    run. Shards are written one by one; an interrupted import resumes where it stopped.
    """
    run(make_request("import", **content), dry_run=dry_run, to_json=as_json)
