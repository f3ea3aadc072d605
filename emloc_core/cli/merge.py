"""``emloc merge``."""

from typing import Any

import rich_click as click

from emloc_core.cli.console import push, stage_options
from emloc_core.cli.options import adapter_on_base
from emloc_core.cli.stage import run
from emloc_core.requests import make_request


@click.command("merge")
@adapter_on_base("Model that the adapter is for", "Directory for the checkpoint.")
@click.option("--allow-uncorrected", is_flag=True,
              help="Merge an adapter that was trained on an emulator without correcting it.")  # fmt: skip
@push
@stage_options
def command(push: str | None, dry_run: bool, as_json: bool, **content: Any) -> None:
    """Merge ADAPTER into its base, as an ordinary checkpoint of the original architecture.

    Shards are written one by one; tensors without a LoRA keep their bytes, and all tensors keep their names.
    """
    run(make_request("merge", **content), dry_run=dry_run, to_json=as_json, push=push)
