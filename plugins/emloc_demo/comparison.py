"""Runs a demo's recipe, and prints its table with an explanation."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import rich_click as click


def compare(recipe: Path, explain: Callable[[dict[str, Any]], str]) -> None:
    """Run a demo's recipe, and print its table and ``explain`` of the results."""
    from emloc_core.cli.recipes import announce_stage, show
    from emloc_core.recipe.recipe import load_recipe
    from emloc_core.recipe.run import run_recipe

    results = run_recipe(recipe, announce=announce_stage)
    show(results, Path(load_recipe(recipe).output))
    with suppress(KeyError):  # a recipe that was edited may not have all that is explained
        click.echo(explain(results))


def chosen_clamp(results: dict[str, Any]) -> str:
    """Return one sentence that says how the LoRA was corrected."""
    clamp, scale = results["correction"]["clamp"], results["correction"].get("scale", 1)
    if scale != 1:
        return f"On held-out rows, the LoRA as it was trained, scaled by {scale:g}, was the best."
    if clamp == 0:
        return "On held-out rows no correction helped, so the LoRA was kept as it was trained."
    return f"Of the corrections compared on held-out rows, clamp {clamp} was the best."
