"""``emloc import``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import as_json, dry_run
from emloc_core.cli.stage import run
from emloc_core.requests import make_request


@click.command("import")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the checkpoint.")
@dry_run
@as_json
def command(dry_run: bool, as_json: bool, **content: Any) -> None:
    """Rewrite SOURCE, a directory or hub id, as transformers' own classes have it, for the other commands.

    For checkpoints that came with code of their own, in a layout that an installed plugin reads. That code is never
    run. Written shard by shard; an interrupted import resumes where it stopped.
    """
    run(make_request("import", **content), dry_run=dry_run, to_json=as_json)
