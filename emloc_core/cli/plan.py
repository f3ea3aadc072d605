"""``emloc plan``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import as_json, print_json, print_table, working
from emloc_core.cli.following import flags, join, read_as, rows
from emloc_core.cli.options import data as data_option
from emloc_core.cli.options import explicit, headroom, options
from emloc_core.cli.options import split as split_option
from emloc_core.settings import AUTO, MEMORY_SETTINGS, TrainSettings
from emloc_core.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from emloc_core.memory.evidence import Recovery
    from emloc_core.memory.model import Need
    from emloc_core.memory.plan import MemoryPlan
    from emloc_core.memory.ways import Way


@click.command("plan")
@click.argument("model")
@click.option("--memory", metavar="SIZE", help="Memory for tuning, such as 24GiB or 24GB.  [default: what inference on "
              "the base needs at the same batch size and length]")  # fmt: skip
@headroom
@click.option("--ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Plan an emulator of this ratio instead of the largest that fits.")  # fmt: skip
@click.option("--kind", default=AUTO, help="Plan an emulator of this kind, as for emloc compress.  [default: the best "
              "way to tune, with an emulator or without; with --ratio, low-rank]")  # fmt: skip
@data_option(help="Rows, as for emloc train: the longest sets the number of tokens per row.")
@split_option
@click.option("--length", type=click.IntRange(1),
              help="Tokens per row, including those of images; with --data, the length to which rows are cut.  "
              "[default: 1024]")  # fmt: skip
@click.option("--images", type=click.IntRange(0), help="Images per row; if the vision tower takes only one size, count "
              "every tile of a photo.  [default: those of the rows, or 1 for an image-text model]"
              )  # fmt: skip
@click.option("--image-size", metavar="WIDTHxHEIGHT", help="Size of the images in pixels, for models that take any "
              "size.  [default: that of the rows, or 448x448]")  # fmt: skip
@options(TrainSettings, skip=set(TrainSettings.model_fields) - set(MEMORY_SETTINGS))
@click.option("--device", metavar="NAME", default="auto", show_default=True,
              help="Which memory to plan for: a GPU's (cuda, xpu), or the process's (cpu); auto: a GPU's if there is "
              "one.")  # fmt: skip
@click.option("--card", metavar="NAME", help="GPU to plan for, such as 'RTX 4090': its memory, unless --memory "
              "is given, and times computed from its published figures. Known: RTX 4080, RTX 3090, RTX 4090, "
              "L40S, A100, H100.")  # fmt: skip
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure this machine for about a "
              "second, and show the least time that a step takes.")  # fmt: skip
@click.option("--details", is_flag=True, help="Show the other ways too, and the memory of every stage, term by term.")
@as_json
def command(data: Any, split: str, length: int | None, details: bool, as_json: bool, **values: Any) -> None:
    """Show the best way to tune MODEL in the memory given, how good it is, and the commands.

    MODEL is a directory, a config.json, a registry entry (its id or file), or a hub id. From the hub only the config is
    downloaded and, with --data, the tokenizer. Nothing is loaded and nothing is trained.
    """
    from emloc_core.api import plan

    train, others = explicit(TrainSettings, values)
    with working("Planning"):
        planned = plan(others.pop("model"), data=data, split=split, length=length, **others, **train)
    if as_json:
        print_json(planned.describe())
    else:
        arguments = {"data": data, "split": split, "length": length}
        _conclude(planned, {**arguments, "columns": values["columns"], "device": values["device"]})
        if details:
            _show_details(planned)
        else:
            click.echo("--details shows the other ways, and the memory of every stage.")
    if planned.advice:
        from emloc_core.memory.decision import no_way

        raise no_way(planned.budget, planned.advice)


def _show_details(planned: "MemoryPlan") -> None:
    content = planned.describe()
    work, weights, parameters = content["workload"], content["weight_bytes"], content["parameters"]
    images = ""
    if image := work["image"]:
        size = f"{image['width']}x{image['height']} pixels and {image['tokens']} tokens"
        images = f", including {work['images']} image(s) of {size} per row"
    checkpointing = "with" if work["gradient_checkpointing"] else "without"
    click.echo(f"rows: {work['rows_per_step']} per step x {work['length']} tokens{images}; {checkpointing} gradient "
               f"checkpointing; {'bf16 autocast' if work['bf16'] else 'no autocast'}; LoRA of rank "
               f"{work['lora_rank']} on {', '.join(work['target_modules'])}; learning rate {work['learning_rate']:g}; "
               f"on {work['device']}")  # fmt: skip
    _show_ways(planned)
    click.echo(f"stages of {planned.way}:")
    print_table(_stages(planned.needs))
    if planned.plan:
        click.echo(f"emulator: {parameters['emulator'] / 1e9:.3g} billion parameters, "
                   f"{human_bytes(weights['emulator'])}; {len(planned.plan.ranks)} Linears become:")  # fmt: skip
        for line in planned.plan.lines(planned.model.format):
            click.echo(f"  {line}")


def _stages(needs: Sequence["Need"]) -> "Table":
    """Return a row for every stage: a column for every term that any stage has, and the sum."""
    from rich.table import Table

    from emloc_core.memory.model import TERMS

    terms = [term for term in TERMS if any(need.terms.get(term) for need in needs)]
    shown = Table()
    shown.add_column("stage", no_wrap=True)
    for term in terms:
        shown.add_column("KV cache" if term == "kv_cache" else term, justify="right")
    shown.add_column("total", justify="right")
    shown.add_column("peak in", no_wrap=True)
    for need in needs:
        cells = [human_bytes(need.terms[term]) if term in need.terms else "-" for term in terms]
        shown.add_row(need.stage, *cells, f"[bold]{human_bytes(need.total)}[/]", need.phase)
    return shown


def _show_ways(planned: "MemoryPlan") -> None:
    computed = f"; times are computed from the published figures of {planned.card}" if planned.card else ""
    click.echo(f"ways to tune{computed}:")
    for way in planned.decision.ways:
        reads = f", reads {human_bytes(way.read_bytes)} of weights per step" if way.read_bytes else ""
        time = "" if way.seconds is None else f", a step takes at least {human_seconds(way.seconds)}"
        verdict = "fits" if way.fits else "does not fit"
        click.echo(f"  {way!s:<65} {human_bytes(way.bytes):>8}  {verdict}{reads}{time}")


def _conclude(planned: "MemoryPlan", arguments: Mapping[str, Any]) -> None:
    """Say what to do, what it costs, how good it is by evidence, and how."""
    content = planned.describe()
    packed = "four bits and " if content["in_four_bits"] else ""
    click.echo(f"{content['model']}: family {content['family']}, {content['parameters']['base'] / 1e9:.3g} billion "
               f"parameters in {packed}{content['dtype']}, {human_bytes(content['weight_bytes']['base'])}")  # fmt: skip
    note = "" if planned.budget.requested else ", which is what inference on the base needs"
    click.echo(f"memory: {planned.budget}{note}")
    if slow := " and ".join(content["workload"]["in_single_precision"]):
        click.echo(f"this processor has no fast products in {slow}: they are computed in single precision")
    best = planned.decision.way
    if best is None:
        click.echo("best: none fits")
    else:
        click.echo(f"best: {best}{_why(planned)}")
        for line in _commands(best, planned, arguments):
            click.echo(f"  {line}")
        time = "" if best.seconds is None else f"; a step takes at least {human_seconds(best.seconds)}{_where(planned)}"
        work = content["workload"]
        rows = f"{work['rows_per_step']} rows of {work['length']:,} tokens per step"
        click.echo(f"  It needs {human_bytes(best.bytes)} for {rows}{time}.")
        if measured := best.recovery:
            click.echo(
                f"  On three tasks with text, a small model got {measured.corrected:.2f} of what an ordinary LoRA gains"
                f", and {measured.polished:.2f} with 20 exact steps (docs/evidence.md)."
            )
            click.echo(
                "  That was in 60 steps at a learning rate of 0.002, train's default for its width"
                f"{in_longer_tuning(measured)}."
            )
            if measured.rounds:
                got = f"{measured.in_rounds:.2f}, without exact steps"
                click.echo(f"  With `rounds = {measured.rounds}` in a recipe it got {got}.")
        inference = planned.model.inference().total
        if planned.budget.requested and inference > planned.budget.usable:
            click.echo(f"  Inference on the base needs {human_bytes(inference)}: within this memory the tuned base "
                       "runs only in part on the device, as emloc chat runs it, or quantised.")  # fmt: skip
    for warning in planned.warnings:
        click.echo(f"warning: {warning}")


def _why(planned: "MemoryPlan") -> str:
    """Return why the best way is with an emulator, or not, as a clause to append to it."""
    from emloc_core.memory.ways import ORDINARY

    first, *_ = planned.decision.ways
    if planned.way.name == ORDINARY:
        return "; no emulator is needed"
    return "" if first.fits else f"; an ordinary LoRA needs {human_bytes(first.bytes)}"


def _where(planned: "MemoryPlan") -> str:
    """Return whose figures times come from, as a clause to append to them."""
    if planned.card:
        return f" by the published figures of {planned.card}"
    on_cpu = planned.model.workload.device == "cpu"
    return " on this machine's CPU (--card 'RTX 4090' plans for such a GPU)" if on_cpu else " on this machine"


def in_longer_tuning(measured: "Recovery") -> str:
    """Return how longer tuning changes a recovery, as a clause to append to it."""
    if measured.longer is None:
        return ""
    lost = round(-measured.longer, 2)
    polished = "" if measured.longer_polished is None else f", and {measured.longer_polished:.2f} with exact ones"
    return f"; in 960 steps it was {f'{lost:.2f} less' if lost > 0 else 'as much'}{polished}"


def _commands(way: "Way", planned: "MemoryPlan", arguments: Mapping[str, Any]) -> list[str]:
    """Return the commands of a way to tune, with the plan's arguments and its decisions."""
    from emloc_core.memory.ways import EXACT, ORDINARY, POLISHED

    data = [*rows(arguments["data"]), *read_as(arguments["split"], arguments["columns"])]
    length = ["--max-length", arguments["length"]] if arguments["length"] else []
    usual, changed = TrainSettings(), planned.model.workload.train.model_dump(exclude_unset=True)
    shape = {"batch_size": way.micro_batch, "accumulation": way.accumulation}
    batch = flags({name: value for name, value in shape.items() if value != getattr(usual, name)})
    other = {name: value for name, value in changed.items() if name not in shape}
    batch += [*flags(other), *length]
    model, commands = planned.name, []
    if planned.layout:
        model, commands = "base", [join("import", planned.name, "-o", "base")]
    if way.name in (EXACT, ORDINARY):
        exact = ["--exact"] if way.name == EXACT else []
        return [*commands, join("train", model, *data, *exact, *batch, "-o", "adapter")]
    size = ["--ratio", f"{way.ratio:g}"] if way.ratio is not None else []
    needs = {need.stage: need.total for need in planned.needs}

    def device(stage: str) -> list[str]:
        """Stages that stream run on the CPU if that was planned, or if they do not fit in the GPU's memory."""
        return ["--device", "cpu"] if arguments["device"] == "cpu" or needs[stage] > planned.budget.usable else []

    commands += [
        join("compress", model, *data, "--kind", way.kind, *size, *length, *device("compress"), "-o", "emulator"),
        join("train", "emulator", *data, *batch, "-o", "adapter"),
        join("correct", "adapter", *device("correct"), "-o", "corrected"),
    ]  # fmt: skip
    if way.name == POLISHED:
        one_row = ["--batch-size", 1, "--accumulation", planned.model.workload.rows_per_step]
        one_row += [*flags({name: value for name, value in other.items() if name == "bf16"}), *length]
        commands.append(join("polish", "corrected", *data, *one_row, "-o", "polished"))
    return commands
