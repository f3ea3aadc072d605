"""What the demo does around its recipe, in separate processes: the demo's own stays small."""

from pathlib import Path
from typing import Any


def prepared(argument: str) -> str:
    """Write what the demo needs to the directory ``argument``; return the recipe's path."""
    from emloc_demo.preparation import prepare

    return str(prepare(Path(argument)))


def planned(argument: str) -> dict[str, Any]:
    """Return what ``emloc plan --json`` says of the model, memory, rows and tuning of the recipe ``argument``."""
    from emloc_core.api import plan
    from emloc_core.recipe.recipe import load_recipe
    from emloc_core.settings import MEMORY_SETTINGS

    recipe = load_recipe(Path(argument))
    tuning = recipe.train.model_dump(include=set(MEMORY_SETTINGS), exclude_unset=True)
    return plan(recipe.model.base, memory=recipe.model.memory, data=recipe.data.train, **tuning).describe()


def reported(argument: str) -> str:
    """Write the page of the run in the directory ``argument``; return its path."""
    from emloc_core.recipe.page import write_page

    return str(write_page(Path(argument), Path(argument) / "report.html"))
