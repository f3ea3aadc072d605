"""``emloc pictures``."""

from pathlib import Path

import rich_click as click


@click.command("pictures")
@click.argument("model")
@click.option("--adapter", "adapters", multiple=True, type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Adapter for the model; repeatable: each has a row of the grid.")  # fmt: skip
@click.option("--prompt", "prompts", multiple=True, required=True, help="Prompt; repeatable: each has a column.")
@click.option("--side", type=click.IntRange(1), default=512, show_default=True, help="Height and width in pixels.")
@click.option("--steps", type=click.IntRange(1), default=28, show_default=True, help="Steps of the solver.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the noise.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("pictures.png"),
              show_default=True, help="File of the grid.")  # fmt: skip
def command(
    model: str, adapters: tuple[Path, ...], prompts: tuple[str, ...], side: int, steps: int, seed: int, output: Path
) -> None:
    """Draw what a pipeline makes of prompts, alone and with adapters, always from the same noise."""
    from emloc_core.errors import EmlocError
    from emloc_diffusers.pictures import Drawing, grid

    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise EmlocError(f"{output} is no picture.", "End its name in .png, .jpg or .webp.")
    rows = {}
    for adapter in (None, *adapters):
        name = adapter.name if adapter else "base"
        click.echo(f"drawing: {name}", err=True)
        rows[name] = Drawing(model, adapter).draw(prompts, side=side, steps=steps, seed=seed)
    grid(rows, prompts, min(side, 256)).save(output)
    click.echo(output)
