"""``emloc compress``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import as_json, dry_run
from emloc_core.cli.options import device, given, options
from emloc_core.cli.stage import run
from emloc_core.errors import EmlocError
from emloc_core.requests import make_request
from emloc_core.settings import CompressSettings, TrainSettings


@click.command("compress")
@click.argument("model")
@click.option("--data", required=True, help="JSONL, JSON or Parquet file, or a hub data set, of your own task.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the emulator.")
@click.option("--exclude", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Rows that are neither calibration nor selection, such as test rows; repeatable.")  # fmt: skip
@click.option("--split", default="train", show_default=True, help="Split of a hub data set.")
@click.option("--keep-spectra", type=click.Path(path_type=Path), metavar="DIRECTORY",
              help="Also keep there what emloc cut makes emulators of other ratios from, in seconds; about as large as "
              "the compressed Linears. Spectra that are there already are used.")  # fmt: skip
@click.option("--memory", metavar="SIZE", help="Instead of --ratio: the largest whose tuning fits, as emloc plan finds "
              "it for the longest row of the data on a GPU; 24GiB, say.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), help="With --memory: rows per step of that tuning.  [default: 8]")
@options(CompressSettings)
@device
@dry_run
@as_json
def command(batch_size: int | None, memory: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Make the emulator of MODEL, a local directory or a hub id: a low-rank copy to train on.

    The model is streamed block by block and is never held in memory as a whole. When the same command is given again,
    an interrupted run resumes at the block where it stopped.
    """
    if batch_size is not None and memory is None:
        raise EmlocError("--batch-size says what is to fit --memory, which is not given.", "Give both or neither.")
    settings, content = given(CompressSettings, options)
    tuning = TrainSettings(batch_size=batch_size) if batch_size else TrainSettings()
    request = make_request("compress", settings, memory=memory, tuning=tuning, **content)
    run(request, dry_run=dry_run, to_json=as_json)
