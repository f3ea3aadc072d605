"""``emloc demo-diffusion``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from emloc_demo.preparation import output_option

#: How a LoRA is tuned in memory, and by exact steps.
TUNED = {"steps": 400, "batch_size": 16, "lora_rank": 8, "lora_alpha": 8, "learning_rate": 4e-3,
         "gradient_checkpointing": False, "bf16": False}  # fmt: skip
#: From low-rank, forty steps recover 0.975 at a rate of 3e-3, 0.979 at 5e-3, and 0.983 at this one.
POLISHED = {"steps": 40, "batch_size": 16, "learning_rate": 1e-2, "bf16": False}
#: Emulators: the name of their LoRA in the table, and how they are made.
EMULATORS: dict[str, dict[str, Any]] = {
    "low-rank 0.45": {"kind": "low-rank", "ratio": 0.45, "calibration": "base", "samples": 32},
    "trellis": {"kind": "trellis", "samples": 16},
}


@click.command("demo-diffusion")
@output_option("build/demo-diffusion")
def command(output: Path) -> None:
    """Train a small FLUX to draw handwritten digits, then teach it a slanted style by EMLoC.

    Needs no network and no GPU, and takes about ten minutes on two cores. Finished parts are kept,
    so an interrupted demo resumes where it stopped; only the base model's training starts again.
    """
    base, test, adapters, sizes = prepare(output)
    results, pictures = judged(base, test, adapters)
    (output / "results.json").write_text(json.dumps({"systems": results, "bytes": sizes}, indent=1))
    click.echo(table(results, sizes))
    click.echo(f"\n{draw(output, pictures)}: what each draws, always from the same noise")


def prepare(output: Path) -> tuple[Path, Path, dict[str, Path | None], dict[str, Any]]:
    """Make the base, the rows and every adapter; return base, test rows, adapters, and the bytes of each emulator."""
    import emloc_core as emloc
    from emloc_core.cli.console import progress
    from emloc_demo.diffusion.pretraining import pretrain
    from emloc_demo.diffusion.style import write_rows

    output.mkdir(parents=True, exist_ok=True)
    base = output / "base"
    if not base.exists():
        click.echo("training the base to draw digits", err=True)
        with progress("pretrain") as advance:
            pretrain(base, advance=advance)
    train, test = write_rows(output / "data", base)

    def run(name: str, stage: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        click.echo(f"{name}", err=True)
        with progress(stage.__name__) as advance:
            return stage(*arguments, progress=lambda event: advance(event.what, event.step, event.total), **settings)

    model, rows = str(base), str(train)
    adapters: dict[str, Path | None] = {"base": None}
    adapters["LoRA on the base"] = run("tuning on the base", emloc.train, model, rows, output / "full", **TUNED).path
    sizes: dict[str, Any] = {}
    for name, how in EMULATORS.items():
        directory = output / name.replace(" ", "-")
        emulator = run(f"{name}: emulator", emloc.compress, model, rows, directory / "emulator", **how)
        sizes[name] = emulator.result["bytes"]
        tuned = run(f"{name}: tuning", emloc.train, emulator, rows, directory / "adapter", **TUNED)
        corrected = run(f"{name}: correction", emloc.correct, tuned, directory / "corrected")
        polished = run(f"{name}: exact steps", emloc.polish, corrected, rows, directory / "polished", **POLISHED)
        adapters |= {f"{name}, corrected": corrected.path, f"{name}, and 40 exact steps": polished.path}
    exact = {**TUNED, **POLISHED, "exact": True}
    alone = run("exact steps alone", emloc.train, model, rows, output / "exact", **exact)
    return base, test, {**adapters, "40 exact steps alone": alone.path}, sizes


def judged(
    base: Path, test: Path, adapters: dict[str, Path | None]
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Return scores and pictures of every system, and how much of the LoRA's gain on the base each recovers."""
    from emloc_demo.diffusion.judging import scores

    results: dict[str, dict[str, float]] = {}
    pictures: dict[str, Any] = {}
    for name, adapter in adapters.items():
        click.echo(f"drawing: {name}", err=True)
        results[name], pictures[name] = scores(base, adapter, test)
    worst, best = results["base"]["loss"], results["LoRA on the base"]["loss"]
    for row in results.values():
        row["recovered"] = (worst - row["loss"]) / (worst - best)
    return results, pictures


def table(results: dict[str, dict[str, float]], sizes: dict[str, Any]) -> str:
    """Return the scores as a table of Markdown."""
    lines = ["| system | held-out loss | recovered | style and digit right, seen / unseen | plain prompts right |",
             "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, row in results.items():
        lines.append(
            f"| {name} | {row['loss']:.3f} | {row['recovered']:.2f} | {row['seen']:.2f} / {row['unseen']:.2f} "
            f"| {row['plain']:.2f} |"
        )
    shares = ", ".join(f"{name} {size['emulator'] / size['base']:.2f}" for name, size in sizes.items())
    return "\n".join([*lines, f"\nBytes of the emulators, of the base's: {shares}."])


def draw(output: Path, pictures: dict[str, Any]) -> Path:
    """Write the grid of pictures, and return its path."""
    from emloc_diffusers.pictures import grid

    from emloc_demo.diffusion.digits import STYLE, WORDS

    rows = {name: [*drawn["style"], *drawn["plain"]] for name, drawn in pictures.items()}
    columns = [*(f"{STYLE} {digit}" for digit in range(len(WORDS))), *(str(digit) for digit in range(len(WORDS)))]
    path = output / "pictures.png"
    grid(rows, columns, 48).save(path)
    return path
