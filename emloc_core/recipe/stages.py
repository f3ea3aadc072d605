"""The stages of a recipe: the request of each, and its output.

An emulator takes three: make it, tune a LoRA on it, correct the LoRA for the base. Without one, a LoRA is tuned on the
base itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.data.rows import CALIBRATION, SELECTION
from emloc_core.errors import EmlocError
from emloc_core.files.manifest import MANIFEST, manifest_value, read_manifest
from emloc_core.files.output import require_same
from emloc_core.files.workspace import Workspace
from emloc_core.recipe.recipe import Recipe
from emloc_core.requests import (
    CompressRequest,
    CorrectRequest,
    EvalRows,
    EvaluateRequest,
    MergeRequest,
    PolishRequest,
    Request,
    System,
    TrainRequest,
)
from emloc_core.settings import DEFAULT_EPOCHS, PolishSettings, TrainSettings


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe."""

    purpose: str
    request: Request

    @property
    def output(self) -> Path:
        """Its output directory."""
        return self.request.output

    @property
    def name(self) -> str:
        """The name of that directory."""
        return self.output.name

    @property
    def state(self) -> str:
        """``there``, ``interrupted`` or ``to do``. The stage itself checks whether an existing output matches."""
        if (self.output / MANIFEST).is_file():
            return "there"
        return "interrupted" if Workspace(self.output).is_started else "to do"

    def require_same_settings(self) -> None:
        """Refuse an output that is there and was made with other settings than the recipe names; nothing is hashed.

        Stages decide what it leaves open. An emulator's settings, which may be adjusted, are not compared.
        """
        manifest = read_manifest(self.output)
        if manifest is None or not isinstance(self.request, CorrectRequest | PolishRequest | TrainRequest):
            return
        request = manifest_value(manifest, self.output, "request", dict)
        recorded = request.get("settings", request)  # a correction's are not by themselves
        wanted = self.request.settings.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        shared = wanted.keys() & recorded.keys()
        require_same(self.output, {key: recorded[key] for key in shared}, {key: wanted[key] for key in shared})


def directory(recipe: Recipe, stage: str, ending: str = "") -> Path:
    """Return the output directory of a stage; ``ending`` tells it from the one of the last round."""
    return Path(recipe.output) / f"{stage}{ending}"


def has(recipe: Recipe, stage: str) -> bool:
    """Return whether the output of a stage is there."""
    return (directory(recipe, stage) / MANIFEST).is_file()


def stages(recipe: Recipe) -> list[Stage]:
    """Return the stages of a recipe, in order."""
    rounds = range(1, recipe.rounds + 1) if recipe.makes_emulator else ()
    return [*(stage for number in rounds for stage in _round(recipe, number)), *_final_stages(recipe)]


def compress_request(recipe: Recipe, number: int = 1) -> CompressRequest:
    """Return the request of stage 1; with the recipe's memory, if nothing has been decided for it yet.

    Args:
        number: of the round.
    """
    data, model = recipe.data, recipe.model
    sized = {"memory": model.memory, "headroom": model.headroom, "tuning": recipe.train} if model.memory else {}
    return CompressRequest(
        model=model.base,
        **_rows(recipe) | {"data": data.calibration or data.train},
        exclude=tuple(map(Path, [*data.test, *([data.eval] if data.eval and not data.eval_split else [])])),
        output=directory(recipe, "emulator", _ending(recipe, number)),
        adapter=directory(recipe, "corrected", _ending(recipe, number - 1)) if number > 1 else None,
        settings=_of_one_loss(recipe.compress, recipe.train).for_tuning(recipe.train),
        **sized,
    )


def _round(recipe: Recipe, number: int) -> list[Stage]:
    """Return the stages of a round, up to the corrected LoRA."""
    data, ending = recipe.data, _ending(recipe, number)
    emulator, adapter = (directory(recipe, name, ending) for name in ("emulator", "adapter"))
    on_base = {"on_base": True, "base": recipe.model.base} if data.eval_base else {}
    correct = CorrectRequest(
        adapter=adapter,
        base=recipe.model.base,
        emulator=emulator,
        output=directory(recipe, "corrected", ending),
        settings=recipe.correct,
    )
    which = f", round {number} of {recipe.rounds}" if recipe.rounds > 1 else ""
    own = {"settings": _share(recipe.train, number, recipe.rounds), "evaluation": _evaluation(recipe, **on_base)}
    return [
        Stage(f"make the emulator{which}", compress_request(recipe, number)),
        Stage(f"tune a LoRA on the emulator{which}", _train(recipe, str(emulator), adapter, _test(recipe), **own)),
        Stage(f"correct it for the base{which}", correct),
    ]


def _test(recipe: Recipe) -> tuple[Path, ...]:
    return tuple(map(Path, recipe.data.test))


def _ending(recipe: Recipe, number: int) -> str:
    """Return the ending of a round's directories; the last round's have none."""
    return "" if number == recipe.rounds else f"_round{number}"


def _share(train: TrainSettings, number: int, rounds: int) -> TrainSettings:
    """Return settings of a round with its share of the steps, and with other rows first than in the one before."""
    if rounds == 1:
        return train
    if train.steps:
        length: dict[str, float] = {"steps": train.steps * number // rounds - train.steps * (number - 1) // rounds}
    else:
        length = {"epochs": (train.epochs or DEFAULT_EPOCHS) / rounds}
    return train.model_copy(update={**length, "seed": train.seed + number - 1})


def _final_stages(recipe: Recipe) -> list[Stage]:
    """Return the stages that follow, or all of them if there is no emulator."""
    base, following, final = recipe.model.base, [], directory(recipe, "corrected")
    held_out = (*_test(recipe), *(directory(recipe, "emulator") / name for name in (CALIBRATION, SELECTION)))
    if not recipe.makes_emulator:
        final, exact = directory(recipe, "adapter"), recipe.way == "exact"
        how = "by exact steps" if exact else "on the model"
        following.append(Stage(f"tune a LoRA {how}", _train(recipe, base, final, _test(recipe), exact=exact)))
    steps = recipe.polish and _of_one_loss(recipe.polish, recipe.train)
    if steps:
        polish = PolishRequest(
            adapter=final,
            base=base,
            **_rows(recipe),
            exclude=held_out,
            evaluation=_evaluation(recipe),
            output=directory(recipe, "polished"),
            settings=steps,
        )
        following.append(Stage("polish it on the base", polish))
        final = polish.output
    if recipe.merge:
        merge = MergeRequest(adapter=final, base=base, output=directory(recipe, "merged"))
        following.append(Stage("merge it into the base", merge))
    if recipe.eval is None:
        return following
    controls = []
    if recipe.eval.full_lora and recipe.makes_emulator:
        controls = [
            Stage(purpose, _train(recipe, base, Path(recipe.output) / name, held_out, **more))
            for name, purpose, more in _controls(recipe.train, steps)
        ]
    evaluate = EvaluateRequest(
        systems=tuple(_compared(recipe, controls)),
        tasks=tuple(recipe.eval.tasks),
        output=directory(recipe, "evaluation"),
        limit=recipe.eval.limit,
        batch_size=recipe.eval.batch_size,
    )
    return [*following, *controls, Stage("compare all of them", evaluate)]


def _train(recipe: Recipe, model: str, output: Path, exclude: tuple[Path, ...], **more: Any) -> TrainRequest:
    usual = {"evaluation": _evaluation(recipe), "settings": recipe.train}
    return TrainRequest(model=model, output=output, exclude=exclude, **_rows(recipe), **(usual | more))


def _rows(recipe: Recipe) -> dict[str, Any]:
    data = recipe.data
    return {"data": data.train, "split": data.split, "columns": data.columns, "skip_bad_rows": data.skip_bad_rows}


def _evaluation(recipe: Recipe, **on_base: Any) -> EvalRows:
    return EvalRows(data=recipe.data.eval, split=recipe.data.eval_split, **on_base)


def _of_one_loss(settings: Any, train: TrainSettings) -> Any:
    """Return settings with the loss of tuning, unless they name another one."""
    if train.loss == "last" or "loss" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"loss": train.loss})


def _controls(train: TrainSettings, polish: PolishSettings | None) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Yield the controls: name, purpose, and what differs from the tuning of the emulator."""
    yield "full_lora", "tune the base itself, the upper bound", {}
    if polish is None:
        return
    # Steps from scratch need tuning's learning rate; polishing's is for a LoRA that is nearly done.
    steps = polish.model_dump(exclude={"learning_rate"}) | {"epochs": None}
    alone = TrainSettings(**{**train.model_dump(), **steps})
    yield "exact_alone", "take the exact steps alone, as a control", {"settings": alone, "exact": True}
    if train.steps:
        together = train.steps + polish.steps
        longer = train.model_copy(update={"steps": together})
        yield f"full_lora_{together}", f"tune the base itself for {together} steps", {"settings": longer}


def _compared(recipe: Recipe, controls: list[Stage]) -> list[System]:
    """Return the systems to compare: those that the recipe names, or all, and the controls."""
    assert recipe.eval is not None
    systems = {system.name: system for system in _systems(recipe)}
    names = systems if recipe.eval.systems is None else recipe.eval.systems
    if unknown := sorted(set(names) - systems.keys()):
        raise EmlocError(
            f"eval.systems names {', '.join(unknown)}, which this recipe does not make.",
            f"It makes {', '.join(systems)}.",
        )
    base = recipe.model.base
    of_controls = [System(name=control.name, model=base, adapter=control.output) for control in controls]
    return [*(system for name, system in systems.items() if name in names), *of_controls]


def _systems(recipe: Recipe) -> Iterable[System]:
    """Yield the systems that the recipe makes, without the controls, in the table's order."""
    base, emulator, adapter = recipe.model.base, str(directory(recipe, "emulator")), directory(recipe, "adapter")
    yield System(name="base", model=base)
    if not recipe.makes_emulator:
        yield System(name="base+lora", model=base, adapter=adapter)
        return
    yield System(name="emulator", model=emulator)
    yield System(name="emulator+lora", model=emulator, adapter=adapter)
    yield System(name="base+uncorrected", model=base, adapter=adapter)
    yield System(name="base+corrected", model=base, adapter=directory(recipe, "corrected"))
    if recipe.polish:
        yield System(name="base+polished", model=base, adapter=directory(recipe, "polished"))
    elif recipe.merge:  # after polishing it would repeat base+polished
        yield System(name="merged", model=str(directory(recipe, "merged")))
