"""The emulators of a recipe that leaves their kind open.

The memory for tuning says which kind is best on average. Where evidence is divided between it and another one, both are
tried.
"""

from collections.abc import Callable

import click

from emloc_core.precheck import precheck
from emloc_core.process import call
from emloc_core.recipe.recipe import SHARED, Recipe
from emloc_core.recipe.stages import attempts, stages_of
from emloc_core.requests import CompressRequest, request_from_json
from emloc_core.settings import AUTO, CompressSettings

#: What may be set of an emulator whose kind is open: the rows, and nothing of how it is made from them. An alternative
#: has the first ones of its own.
_OWN = ("samples", "seed")
_OF_ROWS = {"kind", *_OWN, *SHARED}


def with_alternative(recipe: Recipe, say: Callable[[str], None] = lambda text: click.echo(text, err=True)) -> Recipe:
    """Return the recipe with the alternative that evidence names, if there is one and it fits the memory too.

    A recipe is returned as it is if it gives no memory, says how the emulator is made, names alternatives (or that
    there are none), or could not compare them.

    Args:
        recipe: the recipe.
        say: called with a sentence about the alternative.

    Raises:
        EmlocError: the model cannot be planned.
    """
    if not _is_open(recipe):
        return recipe
    request = stages_of(recipe, attempts(recipe)[0])[0].request
    (kinds,) = call(f"{__name__}:planned", {"request": request.to_json()})
    if len(kinds) < 2:
        return recipe
    best, other = kinds
    say(f"Evidence is divided between {best} and {other}: both are tried. To make one, set compress.kind = {best!r}.")
    given = recipe.compress.model_dump(include=set(_OWN), exclude_unset=True)
    return recipe.model_copy(update={"alternatives": {other: CompressSettings(kind=other, **given)}})


def planned(request: str) -> list[str]:
    """Return the kinds to try for a request, which is JSON: see :func:`emloc_core.memory.budget.recommended`."""
    from emloc_core.memory.budget import recommended

    asked = request_from_json(request)
    assert isinstance(asked, CompressRequest)
    precheck(asked)
    return recommended(asked)


def _is_open(recipe: Recipe) -> bool:
    return (
        recipe.model.memory is not None
        and (recipe.compress.kind == AUTO or "kind" not in recipe.compress.model_fields_set)
        and recipe.compress.model_fields_set <= _OF_ROWS
        and "alternatives" not in recipe.model_fields_set
        and recipe.correct.clamp == "auto"
        and not recipe.train.learns_preferences
    )
