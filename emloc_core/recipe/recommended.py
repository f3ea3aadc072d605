"""The emulators of a recipe that leaves their kind open.

The memory for tuning says which kind is best on average. Where evidence is divided between it and another one, both are
tried.
"""

import click

from emloc_core.process import call
from emloc_core.recipe.recipe import Recipe
from emloc_core.recipe.stages import attempts, stages_of
from emloc_core.requests import CompressRequest, request_from_json
from emloc_core.settings import AUTO

#: What may be set of an emulator whose kind is open: the rows, and nothing of how it is made from them.
_OF_ROWS = {"kind", "samples", "selection", "max_length", "loss", "seed"}


def with_alternative(recipe: Recipe) -> Recipe:
    """Return the recipe with the alternative that evidence names, if there is one and it fits the memory too.

    A recipe is returned as it is if it gives no memory, says how the emulator is made, names alternatives of its own or
    could not compare them.

    Raises:
        EmlocError: the model cannot be planned.
    """
    if not _is_open(recipe):
        return recipe
    first = attempts(recipe)[0]
    request = stages_of(recipe, first)[0].request
    (kind,) = call(f"{__name__}:find", {"request": request.to_json()})
    if kind is None:
        return recipe
    click.echo(
        f"{kind} was better on some tasks than the recommended kind: both are tried. Name compress.kind to make one.",
        err=True,
    )
    other = recipe.compress.model_copy(update={"kind": kind})
    return recipe.model_copy(update={"alternatives": {kind: other}})


def find(request: str) -> str | None:
    """Return the alternative to the emulator of a request, which is JSON: see :func:`emloc_core.memory.budget`."""
    from emloc_core.memory.budget import alternative

    asked = request_from_json(request)
    assert isinstance(asked, CompressRequest)
    return alternative(asked)


def _is_open(recipe: Recipe) -> bool:
    return (
        recipe.model.memory is not None
        and (recipe.compress.kind == AUTO or "kind" not in recipe.compress.model_fields_set)
        and recipe.compress.model_fields_set <= _OF_ROWS
        and not recipe.alternatives
        and recipe.correct.clamp == "auto"
        and not recipe.train.learns_preferences
    )
