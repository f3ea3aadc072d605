"""``emloc train``."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import as_json, dry_run
from emloc_core.cli.options import TRAIN_FLAGS, given, options
from emloc_core.cli.stage import run
from emloc_core.errors import EmlocError
from emloc_core.requests import make_request
from emloc_core.settings import TrainSettings


@click.command("train")
@click.argument("model")
@click.option("--data", required=True, help="JSONL, JSON or Parquet file, or a hub data set, of your own task.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the adapter.")
@click.option("--split", default="train", show_default=True, help="Split of a hub data set.")
@click.option("--exclude", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Rows that are not tuned on, such as test rows; repeatable.")  # fmt: skip
@options(TrainSettings, TRAIN_FLAGS, skip=["extra"])
@click.option("--set", "extra", multiple=True, metavar="KEY=VALUE", help="Any other field of SFTConfig; repeatable.")
@dry_run
@as_json
def command(dry_run: bool, as_json: bool, extra: tuple[str, ...], **options: Any) -> None:
    """Train a LoRA on MODEL, an emulator (or an ordinary model, as the upper bound), with TRL.

    Rows that an emulator keeps for calibration and selection are left out by their content. When the same command is
    given again, an interrupted run resumes at its last checkpoint. For several GPUs:
    accelerate launch -m emloc_core train ...
    """
    settings, content = given(TrainSettings, options)
    request = make_request("train", {**settings, "extra": _pairs(extra)}, **content)
    # PEFT asks transformers by an old name; nothing that a user could fix.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    run(request, dry_run=dry_run, to_json=as_json)


def _pairs(texts: Iterable[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE``; a value that is JSON is that value, any other is text."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise EmlocError(f"--set {text}: not KEY=VALUE.", "Write --set warmup_steps=10, say.")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
