"""``emloc export``."""

from typing import Any

import rich_click as click

from emloc_core.cli.console import push, stage_options
from emloc_core.cli.options import explicit, options, output
from emloc_core.cli.stage import run
from emloc_core.requests import make_request
from emloc_core.settings import ExportSettings


@click.command("export")
@click.argument("source")
@output("Directory for the export.")
@click.option("--base", help="Model that the adapter is for: directory or hub id.  [default: found from SOURCE]")
@click.option(
    "--allow-uncorrected", is_flag=True, help="Export an adapter that was trained on an emulator without correcting it."
)
@options(ExportSettings)
@push
@stage_options
def command(push: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Write SOURCE, an adapter or a merged model, in the form that servers expect.

    An adapter gets a single rank, no patterns, and its scale folded into the weights, so that vLLM, SGLang and PEFT
    read it alike. --gguf writes an adapter or a model for llama.cpp.
    """
    settings, content = explicit(ExportSettings, options)
    run(make_request("export", settings, **content), dry_run=dry_run, to_json=as_json, push=push)
