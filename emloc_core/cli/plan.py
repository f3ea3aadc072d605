"""``emloc plan``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import as_json, print_json, working
from emloc_core.cli.following import flags, join, read_as, rows
from emloc_core.cli.options import data as data_option
from emloc_core.cli.options import given, options
from emloc_core.cli.options import split as split_option
from emloc_core.memory.budget import no_fit
from emloc_core.settings import MEMORY_SETTINGS, TrainSettings
from emloc_core.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from emloc_core.memory.plan import MemoryPlan
    from emloc_core.memory.ways import Way


@click.command("plan")
@click.argument("model")
@click.option("--memory", metavar="SIZE", help="Memory for tuning, such as 24GiB or 24GB.  [default: what inference on "
              "the base needs at the same batch size and length]")  # fmt: skip
@click.option("--ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Plan an emulator of this ratio instead of the largest that fits.")  # fmt: skip
@click.option("--kind", help="Kind of emulator, as for emloc compress.  [default: the one that is best for the memory; "
              "with --ratio, low-rank]")  # fmt: skip
@data_option(help="Rows, as for emloc train: the longest sets the number of tokens per row.")
@split_option
@click.option("--length", "--max-length", "--sequence-length", type=click.IntRange(1),
              help="Tokens per row, including those of images; with --data, the length to which rows are cut.  "
              "[default: 1024]")  # fmt: skip
@click.option("--images", type=click.IntRange(0), help="Images per row; if the vision tower takes one size only, every "
              "tile of a photo counts.  [default: those of the rows, or 1 for an image-text model]"
              )  # fmt: skip
@click.option("--image-size", metavar="WIDTHxHEIGHT", help="Size of the images in pixels, for models that take any "
              "size.  [default: that of the rows, or 448x448]")  # fmt: skip
@options(TrainSettings, skip=set(TrainSettings.model_fields) - set(MEMORY_SETTINGS))
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
              help="Which memory to plan: a GPU's, or the process's.")  # fmt: skip
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure this machine for about a "
              "second, and show how long a step takes at least.")  # fmt: skip
@click.option("--figure", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a chart of the table: png, svg or pdf.")  # fmt: skip
@as_json
def command(
    model: str,
    memory: str | None,
    ratio: float | None,
    data: Any,
    split: str,
    length: int | None,
    images: int | None,
    device: str,
    figure: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Show the memory that each stage needs for MODEL, from its config alone, and the largest emulator that fits.

    MODEL is a directory, a config.json, a registry entry (its id or file), or a hub id. From the hub only the config is
    downloaded and, with --data, the tokenizer. Nothing is loaded and nothing is trained.
    """
    from emloc_core.api import plan

    train, others = given(TrainSettings, settings)
    with working("Planning"):
        planned = plan(
            model, memory=memory, ratio=ratio, kind=others["kind"], data=data, split=split, length=length,
            columns=others["columns"], images=images, image_size=others["image_size"], device=device,
            measure=others["measure"], **train,
        )  # fmt: skip
    if figure:
        from emloc_core.memory.show import memory_figure

        memory_figure(figure, planned.needs, planned.budget)
    if as_json:
        print_json(planned.describe())
    else:
        _show(planned, {"data": data, "split": split, "columns": others["columns"], "length": length})
    if planned.advice and planned.best is None:
        raise no_fit(planned.budget, planned.advice)


def _show(planned: "MemoryPlan", asked: Mapping[str, Any]) -> None:
    from emloc_core.memory.show import print_memory

    said = planned.describe()
    work, weights, parameters = said["workload"], said["weight_bytes"], said["parameters"]
    click.echo(f"{said['model']}: family {said['family']}, {parameters['base'] / 1e9:.3g} billion parameters in "
               f"{said['dtype']}, {human_bytes(weights['base'])}")  # fmt: skip
    images = ""
    if image := work["image"]:
        size = f"{image['width']}x{image['height']} pixels and {image['tokens']} tokens"
        images = f", including {work['images']} image(s) of {size} per row"
    checkpointing = "with" if work["gradient_checkpointing"] else "without"
    click.echo(f"workload: {work['batch_size']} rows x {work['length']} tokens{images}; {checkpointing} gradient "
               f"checkpointing; {'bf16 autocast' if work['bf16'] else 'no autocast'}; LoRA of rank "
               f"{work['lora_rank']} on {', '.join(work['target_modules'])}; on {work['device']}")  # fmt: skip
    print_memory(planned.needs)
    kind, ratio = said["kind"], f" at ratio {planned.ratio:g}" if said["ratio"] else ""
    click.echo(f"emulator of the kind {kind}{ratio}: {parameters['emulator'] / 1e9:.3g} billion parameters, "
               f"{human_bytes(weights['emulator'])}; {len(planned.plan.ranks)} Linears become:")  # fmt: skip
    for line in planned.plan.lines(planned.model.kind):
        click.echo(f"  {line}")
    _judge(planned, said["fits"])
    _show_ways(planned, asked)


def _judge(planned: "MemoryPlan", fits: bool) -> None:
    inference, tuning = (
        next(need.total for need in planned.needs if need.stage == stage)
        for stage in ("inference on the base", "LoRA on the emulator")
    )
    whose = "the budget of" if planned.given else "what inference on the base needs,"
    if fits:
        click.echo(f"tuning the emulator needs {human_bytes(tuning)} and fits {whose} {human_bytes(planned.budget)}")
    elif not planned.advice:
        click.echo(f"tuning the emulator needs {human_bytes(tuning)} and does NOT fit {whose} "
                   f"{human_bytes(planned.budget)}")  # fmt: skip
    elif planned.best:
        click.echo(str(no_fit(planned.budget, planned.advice)))
    if planned.given and inference > planned.budget:
        click.echo(f"inference on the base needs {human_bytes(inference)}: within this budget the tuned base runs "
                   "only in part on the device, as emloc chat runs it, or quantised")  # fmt: skip


def _cost(flops: float, seconds: float | None, reads: str = "") -> str:
    time = f", at least {human_seconds(seconds)}" if seconds is not None else ""
    return f"{flops:.2g} operations{reads}{time}"


def _commands(way: "Way", planned: "MemoryPlan", asked: Mapping[str, Any]) -> list[str]:
    """Return the commands of a way to tune, with what the plan was asked for."""
    from emloc_core.memory.ways import EXACT, ORDINARY, POLISHED

    data = [*rows(asked["data"]), *read_as(asked["split"], asked["columns"])]
    length = ["--max-length", asked["length"]] if asked["length"] else []
    usual, given = TrainSettings(), planned.model.workload.train.model_dump(exclude_unset=True)
    shape = {"batch_size": way.micro_batch, "accumulation": way.accumulation}
    batch = flags({name: value for name, value in shape.items() if value != getattr(usual, name)})
    other = {name: value for name, value in given.items() if name not in shape}
    batch += [*flags(other), *length]
    if way.name in (EXACT, ORDINARY):
        exact = ["--exact"] if way.name == EXACT else []
        return [join("train", planned.name, *data, *exact, *batch, "-o", "adapter")]
    size = ["--ratio", f"{way.ratio:g}"] if way.ratio is not None else []
    found = [
        join("compress", planned.name, *data, "--kind", way.kind, *size, *length, "-o", "emulator"),
        join("train", "emulator", *data, *batch, "-o", "adapter"),
        join("correct", "adapter", "-o", "corrected"),
    ]
    if way.name == POLISHED:
        one_row = ["--batch-size", 1, "--accumulation", way.micro_batch * way.accumulation]
        one_row += [*flags({name: value for name, value in other.items() if name == "bf16"}), *length]
        found.append(join("polish", "corrected", *data, *one_row, "-o", "polished"))
    return found


def _show_ways(planned: "MemoryPlan", asked: Mapping[str, Any]) -> None:
    from emloc_core.memory.ways import ORDINARY

    click.echo(f"ways to tune within {human_bytes(planned.budget)}, with the same rows per step:")
    for way in planned.ways:
        kind = f" ({way.kind})" if way.kind else ""
        name = f"{way.name}{kind} at ratio {way.ratio:g}" if way.ratio is not None else f"{way.name}{kind}"
        reads = f", reads {human_bytes(way.read_bytes)} of weights per step" if way.read_bytes else ""
        first = f"; compress: {_cost(way.compress_flops, way.compress_seconds)}" if way.compress_flops else ""
        click.echo(
            f"  {name:<50} {human_bytes(way.bytes):>8}  {'fits' if way.fits else 'does not fit':<13} "
            f"{way.micro_batch} x {way.accumulation} rows per step, {_cost(way.flops, way.seconds, reads)}{first}"
        )
    best = planned.best
    if best is None:
        click.echo("best: none fits")
    else:
        click.echo(f"best: {best.name}{'; no emulator is needed' if best.name == ORDINARY else ''}")
        for line in _commands(best, planned, asked):
            click.echo(f"  {line}")
        if measured := best.recovery:
            click.echo(
                f"  On three tasks with text, a small model got {measured.corrected:.2f} of what an ordinary LoRA gains"
                f", and {measured.polished:.2f} with 20 exact steps (docs/evidence.md)."
            )
        if best.alternative:
            click.echo(
                f"  On one of them, {best.alternative} gave more: a recipe with this memory and no kind tries both, "
                "where both fit (docs/recipes.md)."
            )
    for warning in planned.warnings:
        click.echo(f"warning: {warning}")
