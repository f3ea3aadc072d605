"""Decides for a recipe that names a memory: the way to tune, the emulator, the rows per batch."""

from collections.abc import Callable
from typing import Any

import click

from emloc_core.errors import EmlocError
from emloc_core.processes.call import call
from emloc_core.recipe.recipe import Recipe
from emloc_core.recipe.stages import compress_request
from emloc_core.requests import CompressRequest, request_from_json
from emloc_core.settings import AUTO, PolishSettings
from emloc_core.stages.precheck import precheck

#: What may be set for an emulator whose kind is open: the rows, and what stays dense.
_OF_ROWS = {"kind", "samples", "seed", "keep", "selection", "max_length", "loss"}


def _echo(line: str) -> None:
    click.echo(line, err=True)


def decided(recipe: Recipe, tell: Callable[[str], None] = _echo, *, adds_polish: bool = False) -> Recipe:
    """Return the recipe with what is decided for its memory; unchanged if it names none.

    What the recipe itself says stays: an emulator that it describes is made even if an ordinary LoRA would fit.

    Args:
        recipe: its paths are absolute.
        tell: called with each line that says what is decided, and why.
        adds_polish: whether to add exact steps where they pay off.

    Raises:
        EmlocError: the model cannot be planned, or nothing fits.
    """
    if recipe.model.memory is None:
        return recipe
    request = compress_request(recipe)
    precheck(request)
    way = recipe.way or (None if _is_open(recipe) else "emulator")
    (plan,) = call(f"{__name__}:decision", {"request": request.to_json(), "way": way})
    if recipe.merge and plan["in_four_bits"]:
        raise EmlocError(
            f"{recipe.model.base} is in four bits, but a LoRA can only be merged into the original.",
            "Leave the merge out, and give the original to `emloc merge --base` afterwards.",
            code="unsupported",
        )
    for line in plan["lines"]:
        tell(line)
    changes: dict[str, Any] = {
        "model": recipe.model.model_copy(update={"memory": None, "headroom": None}),
        "way": plan["way"],
        "train": recipe.train.model_copy(update=plan["rows"]),
        "compress": recipe.compress.model_copy(update=plan["emulator"]),
    }
    if adds_polish and plan["polished"] and recipe.polish is None:
        changes["polish"] = one_row_at_a_time(PolishSettings(batch_size=recipe.train.batch_size,
                                                             accumulation=recipe.train.accumulation))  # fmt: skip
    elif recipe.polish and plan["way"] != "emulator":
        tell("Exact steps would only repeat the tuning on the model itself: [polish] is left out.")
        changes["polish"] = None
    elif recipe.polish and "batch_size" not in recipe.polish.model_fields_set:
        changes["polish"] = one_row_at_a_time(recipe.polish)
    return recipe.model_copy(update=changes)


def one_row_at_a_time(polish: PolishSettings) -> PolishSettings:
    """Return settings with the same rows per step, but one at a time, as exact steps are planned."""
    return polish.model_copy(update={"batch_size": 1, "accumulation": polish.batch_size * polish.accumulation})


def decision(request: str, way: str | None) -> dict[str, Any]:
    """Return what is decided for a recipe; imports torch.

    Args:
        request: of stage 1, in JSON.
        way: ``emulator``, ``lora`` or ``exact``, if the recipe names it.

    Returns:
        The way; whether the base is in four bits; the rows of a step, as settings of stage 2; kind and ratio of the
        emulator, if there is one; and lines that explain it.

    Raises:
        EmlocError: nothing fits.
    """
    from emloc_core.memory.decision import decision_for

    compress = request_from_json(request)
    assert isinstance(compress, CompressRequest)
    decision = decision_for(compress)
    chosen = decision.best(way)
    return {
        "way": chosen.key,
        "in_four_bits": bool(decision.base.packed),
        "rows": chosen.step_settings,
        "emulator": chosen.emulator_settings,
        "polished": chosen.is_polished,
        "lines": decision.explain(chosen),
    }


def _is_open(recipe: Recipe) -> bool:
    """Whether the recipe leaves open whether there is an emulator at all."""
    return recipe.compress.kind == AUTO and recipe.compress.model_fields_set <= _OF_ROWS
