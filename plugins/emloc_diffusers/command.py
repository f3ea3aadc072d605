"""``emloc pictures``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import as_json, print_json

#: Prompts of the data that are drawn, at most, where none is given.
_PROMPTS = 8


@click.command("pictures")
@click.argument("model")
@click.option("--adapter", "adapters", multiple=True, type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Adapter for the model; repeatable: each gets a row of the grid.")  # fmt: skip
@click.option("--prompt", "prompts", multiple=True, help="Prompt; repeatable: each gets a column.")
@click.option("--data", help="Held-out rows of pictures: shows the loss of each system on them and, without "
              "--prompt, draws their first prompts.")  # fmt: skip
@click.option("--side", type=click.IntRange(1), default=512, show_default=True, help="Height and width in pixels.")
@click.option("--steps", type=click.IntRange(1), default=28, show_default=True, help="Steps of the solver.")
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale.  [default: the pipeline's]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed for the noise.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("pictures.png"),
              show_default=True, help="File for the grid.")  # fmt: skip
@as_json
def command(
    model: str,
    adapters: tuple[Path, ...],
    prompts: tuple[str, ...],
    data: str | None,
    side: int,
    output: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw what a pipeline makes of prompts, alone and with adapters, from the same noise; and score them."""
    from emloc_core.data.rows import load_rows
    from emloc_core.errors import EmlocError
    from emloc_diffusers.pictures import Drawing, grid
    from emloc_diffusers.scores import Losses

    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise EmlocError(f"{output} is not a picture file.", "End its name in .png, .jpg or .webp.")
    if data is None and not prompts:
        raise EmlocError("Nothing says what to draw.", "Add --prompt or --data.")
    rows = load_rows(data) if data else []
    losses = Losses(model, rows, side) if rows else None
    prompts = prompts or tuple(dict.fromkeys(str(row.prompt) for row in rows))[:_PROMPTS]
    drawn: dict[str, Any] = {}
    scores: dict[str, dict[str, float]] = {}
    for adapter in (None, *adapters):
        name = adapter.name if adapter else "base"
        name = str(adapter) if name in drawn else name
        click.echo(f"drawing: {name}", err=True)
        drawn[name] = Drawing(model, adapter).draw(prompts, side=side, **options)
        scores[name] = {"loss": losses.mean(adapter)} if losses else {}
    grid(drawn, prompts, min(side, 256)).save(output)
    if as_json:
        print_json({"output": str(output), "systems": scores})
        return
    for name, values in scores.items() if losses else ():
        click.echo(f"{name}: loss {values['loss']:.4f}")
    click.echo(output)
