"""``emloc pictures`` and ``emloc plan-pictures``."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich_click as click


@click.command("plan-pictures")
@click.argument("model")
@click.option("--kind", default="2.7-bit", show_default=True, help="Kind of emulator.")
@click.option("--ratio", type=float, help="Its ratio; by default the kind's own.")
@click.option("--side", type=click.IntRange(16), default=512, show_default=True, help="Height and width in pixels.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Pictures at once.")
@click.option("--rank", "lora_rank", type=click.IntRange(1), default=16, show_default=True, help="Rank of the LoRA.")
@click.option("--bf16/--no-bf16", default=False, show_default=True, help="Tune under autocast to bfloat16.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_command(model: str, kind: str, ratio: float | None, side: int, as_json: bool, **train: Any) -> None:
    """Compute what tuning on pictures takes of a GPU: MODEL is a directory, a config.json, a hub id, or published.

    A real step is run on tensors without contents, so that nothing is downloaded or allocated; it takes a minute or two
    for a large transformer. Published are black-forest-labs/FLUX.1-dev, black-forest-labs/FLUX.2-dev and
    Qwen/Qwen-Image. Encoders run before, once, and on the CPU where a GPU does not hold them.
    """
    from emloc_core.cli.console import print_json
    from emloc_core.files.checkpoint import find_config
    from emloc_core.settings import TrainSettings
    from emloc_core.units import human_bytes
    from emloc_diffusers.plan import PUBLISHED, plan
    from emloc_diffusers.transformer import Config, read_config

    config = Config(PUBLISHED[model]) if model in PUBLISHED else read_config(find_config(model))
    found = plan(config, TrainSettings(**train), kind, ratio, side)
    if as_json:
        print_json({"model": model, "kind": kind, "total_bytes": found.total, **asdict(found)})
        return
    click.echo(f"{model}: {found.parameters / 1e9:.3g} billion parameters, {human_bytes(found.base)} in bfloat16")
    click.echo(f"emulator {kind}: {human_bytes(found.emulator)}")
    for name, size in found.terms.items():
        click.echo(f"  {name:<12} {human_bytes(size):>9}")
    click.echo(f"tuning at {side} pixels: {human_bytes(found.total)}, in the {found.phase}")


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
