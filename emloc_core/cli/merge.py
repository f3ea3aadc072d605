"""``emloc merge``."""

from typing import Any

import rich_click as click

from emloc_core.cli.console import as_json, dry_run
from emloc_core.cli.options import adapter_on_base
from emloc_core.cli.stage import run
from emloc_core.requests import make_request


@click.command("merge")
@adapter_on_base("The model that the adapter is for", "Directory of the checkpoint.")
@click.option("--allow-uncorrected", is_flag=True, help="Merge an adapter as it was trained on an emulator.")
@dry_run
@as_json
def command(dry_run: bool, as_json: bool, **content: Any) -> None:
    """Merge ADAPTER into its base: an ordinary checkpoint of the original architecture.

    Written shard by shard; tensors without a LoRA keep their bytes, and every tensor keeps its name.
    """
    run(make_request("merge", **content), dry_run=dry_run, to_json=as_json)
