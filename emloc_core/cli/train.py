"""``emloc train``."""

import json
import sys
import warnings
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import announce, as_json, dry_run, print_json
from emloc_core.cli.options import options, validated
from emloc_core.errors import EmlocError
from emloc_core.settings import FLAGS, TrainSettings
from emloc_core.units import human_bytes

if TYPE_CHECKING:
    from emloc_core.tuning.train import FineTuning


@click.command("train")
@click.argument("model")
@click.option("--data", required=True, help="JSONL, JSON or Parquet file, or a hub data set, of your own task.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the adapter.")
@click.option("--split", default="train", show_default=True, help="Of a hub data set.")
@click.option("--exclude", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Rows that are not tuned on, such as test rows; repeatable.")  # fmt: skip
@options(TrainSettings, FLAGS, skip=["extra"])
@click.option("--set", "extra", multiple=True, metavar="KEY=VALUE", help="Any other field of SFTConfig; repeatable.")
@dry_run
@as_json
def command(
    model: str,
    data: str,
    output: Path,
    split: str,
    exclude: tuple[Path, ...],
    extra: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a LoRA on MODEL, an emulator (or a whole model, as the upper bound), with TRL.

    Rows that an emulator keeps for calibration and selection are left out by their content. An interrupted run goes
    on from its last checkpoint when the same command is given again. For several GPUs:
    accelerate launch -m emloc_core train ...
    """
    chosen = validated(TrainSettings, {**settings, "extra": _pairs(extra)})

    # PEFT asks transformers by an old name; nothing that a user could mend.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)

    from emloc_core.files.checkpoint import open_checkpoint
    from emloc_core.tuning.train import FineTuning

    job = FineTuning(open_checkpoint(model).directory, data, output, chosen, exclude, split)
    if dry_run:
        _describe(job, as_json)
        return
    with redirect_stdout(sys.stderr):  # the trainer prints its losses: stdout is for the result
        directory, is_main = job.run(), job.is_main_process
    if is_main:
        announce("train", directory, _summary(directory), to_json=as_json)


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


def _describe(job: "FineTuning", as_json: bool) -> None:
    content = {"output": str(job.path), **job.describe()}
    if as_json:
        print_json(content)
        return
    click.echo(f"{job.model.directory}: family {content['family']}, {human_bytes(content['model_bytes'])}")
    click.echo(f"rows: {content['rows']} to train on, {content['excluded_rows']} left out")
    click.echo(f"{content['steps']} steps; LoRA on {', '.join(content['target_modules'])}")


def _summary(directory: Path) -> list[str]:
    from emloc_core.files.output import read_manifest

    result = (read_manifest(directory) or {})["result"]
    lines = [
        f"{result['steps']} steps on {result['rows']} rows ({result['excluded_rows']} left out): "
        f"mean loss {result['train_loss']:.4f}, {result['trainable_parameters']:,} trainable parameters"
    ]
    if result["dropped_rows"]:
        lines.append(f"{result['dropped_rows']} rows dropped: the maximum length leaves nothing of their completion")
    return lines
