"""``emloc compress``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import stage_options
from emloc_core.cli.options import data, device, explicit, headroom, options, output, skip, split
from emloc_core.cli.stage import run
from emloc_core.requests import make_request
from emloc_core.settings import MEMORY_SETTINGS, CompressSettings, TrainSettings


@click.command("compress")
@click.argument("model")
@data(required=True)
@output("Directory for the emulator.")
@click.option("--exclude", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="File with rows to leave out, such as test rows; repeatable.")  # fmt: skip
@split
@skip
@click.option("--memory", metavar="SIZE", help="Memory to tune in, such as 24GiB: chooses --kind and --ratio, as emloc "
              "plan does.")  # fmt: skip
@headroom
@click.option("--tuned-on", metavar="NAME", default="auto", show_default=True,
              help="With --memory: the device it applies to, cpu, cuda, xpu, or auto.")  # fmt: skip
@options(TrainSettings, skip=set(TrainSettings.model_fields) - set(MEMORY_SETTINGS), parent="--memory", hidden=True)
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIRECTORY", help="LoRA of MODEL, corrected or "
              "trained on it. The emulator is fitted with it, and emloc train then trains it further.")  # fmt: skip
@options(CompressSettings)
@device
@stage_options
def command(memory: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Make an emulator of MODEL, a directory or hub id: a smaller copy to train on.

    The model is streamed block by block, and the same command resumes an interrupted run. With --memory, the options
    of emloc train that affect memory can be given too, such as --batch-size and --lora-rank.
    """
    settings, content = explicit(CompressSettings, options)
    tuning, content = explicit(TrainSettings, content)
    request = make_request("compress", settings, memory=memory, tuning=tuning, **content)
    run(request, dry_run=dry_run, to_json=as_json)
