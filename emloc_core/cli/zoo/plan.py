"""``emloc zoo plan``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import as_json, print_json, progress
from emloc_core.cli.options import headroom
from emloc_core.cli.zoo.entries import more_entries, print_rows
from emloc_core.settings import AUTO
from emloc_core.units import human_bytes

if TYPE_CHECKING:
    from emloc_core.memory.budget import Budget
    from emloc_core.registry.fit import EntryFit


@click.command("plan")
@click.argument("pattern", default="*")
@click.option("--memory", metavar="SIZE", help="Memory for tuning, such as 24GiB or 24GB.  [default: what inference on "
              "each model needs]")  # fmt: skip
@headroom
@click.option("--preset", default="default", show_default=True,
              help="Preset of the entries: LoRA, batch size and length.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), help="Rows per step.  [default: the preset's]")
@click.option("--length", type=click.IntRange(1), help="Tokens per row, including those of images.  "
              "[default: the preset's]")  # fmt: skip
@click.option("--kind", default=AUTO, help="Kind of emulator, as for emloc compress.  [default: the one that is best "
              "for the memory]")  # fmt: skip
@click.option("--device", metavar="NAME", default="cuda", show_default=True,
              help="Which memory to plan for: a GPU's (cuda, xpu), or the process's (cpu).")  # fmt: skip
@more_entries
@as_json
def command(
    pattern: str, memory: str | None, headroom: str | None, preset: str, device: str, registry: tuple[Path, ...],
    as_json: bool, **workload: Any,
) -> None:  # fmt: skip
    """Show the memory that registry models need, and the best emulator whose tuning fits.

    For each model: inference on the base, a LoRA on the base, and a LoRA on its emulator (EMLoC). Takes seconds per
    model, without network or weights; `emloc plan ID` shows more about one. PATTERN is as for `emloc zoo list`.
    """
    from emloc_core.errors import EmlocError
    from emloc_core.memory.budget import Budget

    budget = Budget.named(memory, headroom, device)
    from emloc_core.registry.fit import EntryFit, fit
    from emloc_core.registry.registry import find, load_entries

    entries = find(pattern, load_entries(registry))
    planned: list[EntryFit] = []
    with progress("planning") as advance:
        for number, entry in enumerate(entries):
            advance(entry.id, number, len(entries))
            try:
                planned.append(fit(entry, budget, preset=preset, device=device, **workload))
            except EmlocError as error:  # the others are still planned
                planned.append(EntryFit(entry.id, entry.family, error=str(error)))
        advance("", len(entries), len(entries))
    if as_json:
        sizes = {"memory": budget and budget.memory, "headroom": budget and budget.headroom}
        print_json({**sizes, "preset": preset, "device": device, "models": [asdict(entry) for entry in planned]})
    else:
        _show(planned, budget)
    if failed := [entry for entry in planned if entry.error]:
        raise EmlocError(f"{len(failed)} of {len(planned)} models could not be planned.", "Each says why.")


def _show(planned: "list[EntryFit]", budget: "Budget | None") -> None:
    allowed = f"in {human_bytes(budget.usable)}" if budget else "in inference's memory"
    print_rows(
        {"model": "left", "parameters": "right", "rows x tokens": "right", "inference": "right", "LoRA": "right",
         f"EMLoC {allowed}": "right", "kind": "left", "ratio": "right", "emulator": "right"},
        [_row(entry) for entry in planned],
    )  # fmt: skip
    for entry in planned:
        if entry.error:
            click.echo(f"{entry.id}: {entry.error}")
    if budget:
        click.echo(f"Of {budget}.")
    if any(entry.kind is None and not entry.error for entry in planned):
        click.echo("-: no emulator's tuning fits; `emloc plan ID --memory SIZE` says what would.")
    if any(_fits_itself(entry) for entry in planned):
        click.echo("*: a LoRA on the model itself fits too; no emulator is needed.")


def _row(planned: "EntryFit") -> list[str]:
    if planned.error:
        return [planned.id, *["?"] * 8]
    return [
        planned.id,
        f"{(planned.parameters or 0) / 1e9:.3g}B",
        f"{planned.batch_size} x {planned.length}",
        _size(planned.inference),
        _size(planned.lora),
        _size(planned.tuning),
        f"{planned.kind or '-'}{'*' if planned.kind and _fits_itself(planned) else ''}",
        "-" if planned.ratio is None else f"{planned.ratio:g}",
        _size(planned.emulator),
    ]


def _fits_itself(planned: "EntryFit") -> bool:
    return planned.way == "LoRA on the base"


def _size(value: int | None) -> str:
    return "-" if value is None else human_bytes(value)
