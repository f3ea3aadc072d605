"""``emloc demo-vision``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_demo.comparison import chosen_clamp, compare
from emloc_demo.preparation import copy_recipe, output_option


@click.command("demo-vision")
@output_option("build/demo-vision")
def command(output: Path) -> None:
    """Train a small InternVL to read handwritten digits, then adapt it by EMLoC to put them in order.

    Needs no network and no GPU, and takes about ten minutes on two cores. Finished parts are kept,
    so an interrupted demo resumes where it stopped; only the base model's training starts again.
    """
    compare(prepare(output), explain)


def prepare(directory: Path) -> Path:
    """Write base model, data, tasks and recipe to ``directory``, each unless it is there; return the recipe's path.

    Raises:
        EmlocError: a package of the demo is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    base, data = directory / "base", directory / "data"
    if not (base.exists() and data.exists()):
        from emloc_core.cli.console import progress
        from emloc_demo.vision.pictures import TURNS, load_digits
        from emloc_demo.vision.pretraining import pretrain
        from emloc_demo.vision.rows import split, write_data

        if not data.exists():
            click.echo("drawing the pictures", err=True)
            write_data(data, split(load_digits()))
        if not base.exists():
            click.echo("training the base model to read digits", err=True)
            with progress("pretrain") as advance:
                pretrain(base, split(load_digits(TURNS))["pretraining"], advance=advance)
    return copy_recipe("emloc_demo.vision", directory)


def explain(results: dict[str, Any]) -> str:
    """Return one paragraph that says what the table shows."""
    systems = results["systems"]
    share = results["compression"]["bytes"]["emulator"] / results["compression"]["bytes"]["base"]

    def right(system: str, task: str = "order") -> str:
        return f"{systems[system][f'{task}.exact_match']:.0%}"

    return (
        f"\nWhat you see: the base model reads all digits of {right('base', 'read')} of the test pictures, none of "
        f"whose digits it has seen. Asked for the smallest first, which it never was before, it answers "
        f"{right('base')} rightly. A LoRA was tuned for that on an emulator of {share:.0%} of the model's bytes, and "
        f"then corrected: {right('base+corrected')}. The same LoRA, tuned on the model itself, answers "
        f"{right('full_lora')}. {chosen_clamp(results)} Asked the old question, the adapted model still answers "
        f"{right('base+corrected', 'read')} rightly: it was tuned on the new one alone."
    )
