"""``emloc compress``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource

from emloc_core.cli.console import announce, as_json, dry_run, print_json, progress
from emloc_core.cli.emulators import size_lines, sizes, summary
from emloc_core.cli.options import device as device_option
from emloc_core.cli.options import options, validated
from emloc_core.errors import EmlocError
from emloc_core.files.output import TIMING, read_json
from emloc_core.settings import CompressSettings
from emloc_core.units import human_bytes, human_seconds, parse_bytes

if TYPE_CHECKING:
    from emloc_core.emulator.compress import Compression


@click.command("compress")
@click.argument("model")
@click.option("--data", required=True, help="JSONL, JSON or Parquet file, or a hub data set, of your own task.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the emulator.")
@click.option("--exclude", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Rows that are neither calibration nor selection, such as test rows; repeatable.")  # fmt: skip
@click.option("--split", default="train", show_default=True, help="Of a hub data set.")
@click.option("--keep-spectra", type=click.Path(path_type=Path), metavar="DIRECTORY",
              help="Also keep there what emloc cut makes emulators of other ratios from, in seconds; about as large as "
              "the compressed Linears. Spectra that are there already are used.")  # fmt: skip
@click.option("--memory", metavar="SIZE", help="Instead of --ratio: the largest whose tuning fits, as emloc plan finds "
              "it for the longest row of the data on a GPU; 24GiB, say.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), help="With --memory: rows a step of that tuning.  [default: 8]")
@options(CompressSettings)
@device_option
@dry_run
@as_json
def command(
    model: str,
    data: str,
    split: str,
    exclude: tuple[Path, ...],
    output: Path,
    keep_spectra: Path | None,
    device: str,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make the emulator of MODEL, a local directory or a hub id: a low-rank copy to train on.

    The model is streamed block by block and never in memory whole. An interrupted run goes on at the block where it
    stopped when the same command is given again.
    """
    budget, batch_size = _budget(settings.pop("memory"), settings.pop("batch_size"))
    chosen = validated(CompressSettings, settings)

    from emloc_core.data.rows import load_rows, without
    from emloc_core.files.checkpoint import open_checkpoint

    base = open_checkpoint(model)
    rows = without(load_rows(data, split), exclude)

    # These take seconds: a model or rows that are not there are told before.
    from emloc_core.emulator.compress import Compression
    from emloc_core.model.device import choose_device

    if budget is not None:
        chosen = chosen.model_copy(update={"ratio": _ratio(base.directory, budget, batch_size, data, split, chosen)})
    job = Compression(base, rows, output, chosen, keep_spectra, choose_device(device))
    if dry_run:
        _describe(job, as_json)
        return
    with progress("Compressing") as advance:
        directory = job.run(advance)
    lines = summary(directory)
    if keep_spectra:
        timing = read_json(keep_spectra / TIMING)
        took = f"{human_seconds(timing['seconds'])}, peak memory {human_bytes(timing['peak_rss_bytes'])}"
        lines.append(f"spectra, to cut other ratios from: {keep_spectra}  ({took})")
    announce("compress", directory, lines, to_json=as_json)


def _budget(memory: str | None, batch_size: int | None) -> tuple[int | None, int | None]:
    """Return the budget in bytes and the batch that is to fit it; refuse options that contradict each other."""
    if memory is None:
        if batch_size is not None:
            raise EmlocError("--batch-size says what is to fit --memory, which is not given.", "Give both or neither.")
        return None, None
    context = click.get_current_context()
    assert context is not None
    if context.get_parameter_source("ratio") is not ParameterSource.DEFAULT:
        raise EmlocError("--ratio and --memory both say how large the emulator is.", "Give one of them.")
    return parse_bytes(memory), batch_size


def _ratio(base: Path, budget: int, batch_size: int | None, data: str, split: str, settings: CompressSettings) -> float:
    """Return the largest ratio whose tuning fits, and say it on stderr."""
    from emloc_core.memory.budget import require_fit
    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import make_workload
    from emloc_core.settings import TrainSettings

    train = TrainSettings(batch_size=batch_size) if batch_size else TrainSettings()
    file = base / "config.json"
    workload = make_workload(file, train, length=settings.max_length, data=data, split=split)
    fit = require_fit(MemoryModel(file, workload), budget)
    click.echo(
        f"ratio {fit.ratio:g}: tuning with {workload.batch_size} rows x {workload.length} tokens needs "
        f"{human_bytes(fit.need.total)} of {human_bytes(budget)}",
        err=True,
    )
    return fit.ratio


def _describe(job: "Compression", as_json: bool) -> None:
    content: dict[str, Any] = {
        **sizes(job),
        "calibration_rows": len(job.rows.calibration),
        "selection_rows": len(job.rows.selection),
        "tuning_rows": len(job.rows.tuning),
        "calibration_tokens": sum(len(sample.input_ids) for sample in job.samples),
        "finished": job.is_finished(),
    }
    if as_json:
        print_json(content)
        return
    for line in size_lines(job):
        click.echo(line)
    if job.ranks_by_spectra:
        click.echo("  (uniform ranks; calibration decides how the same number of parameters is shared out)")
    click.echo(
        f"rows: {content['calibration_rows']} calibration ({content['calibration_tokens']:,} tokens), "
        f"{content['selection_rows']} selection, {content['tuning_rows']} left for tuning"
    )
