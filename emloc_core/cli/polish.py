"""``emloc polish``."""

import warnings
from typing import Any

import rich_click as click

from emloc_core.cli.console import as_json, dry_run
from emloc_core.cli.options import TRAIN_FLAGS, adapter_on_base, given, options, pairs, rows
from emloc_core.cli.stage import run
from emloc_core.requests import make_request
from emloc_core.settings import ExactSettings, PolishSettings


@click.command("polish")
@adapter_on_base("The model that the adapter is used on", "Directory of the result.")
@rows
@options(PolishSettings, TRAIN_FLAGS, skip=["extra"])
@options(ExactSettings)
@dry_run
@as_json
def command(dry_run: bool, as_json: bool, extra: tuple[str, ...], **options: Any) -> None:
    """Take a few exact LoRA steps on the base itself, from ADAPTER, in the memory of a few blocks.

    ADAPTER comes from correct, from train, or from PEFT; it is left as it was. The base is read block by block, twice
    per step however many rows a step has. When the same command is given again, an interrupted run resumes at its last
    checkpoint.
    """
    settings, content = given(PolishSettings, options)
    limits, content = given(ExactSettings, content)
    request = make_request("polish", {**settings, "extra": pairs(extra)}, limits=limits, **content)
    # PEFT asks transformers by an old name; nothing that a user could fix.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    run(request, dry_run=dry_run, to_json=as_json)
