"""The stages of a recipe: what each is asked to do, and where.

Every emulator that is tried takes three: make it, tune a LoRA on it, correct that for the base. What follows starts
from the LoRA that serves the base best.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.data.rows import CALIBRATION, SELECTION
from emloc_core.files.documents import read_json
from emloc_core.files.output import MANIFEST
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
from emloc_core.settings import CompressSettings, PolishSettings, TrainSettings


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        purpose: one line for people.
        request: what it should do.
    """

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


@dataclass(frozen=True)
class Attempt:
    """An emulator, and the directories of what is made with it.

    Attributes:
        root: directory of the run.
        name: of an alternative; empty for the emulator of the section ``compress``.
        settings: how the emulator is made.
    """

    root: Path
    name: str
    settings: CompressSettings

    @property
    def emulator(self) -> Path:
        """The emulator."""
        return self._directory("emulator")

    @property
    def adapter(self) -> Path:
        """The LoRA that is tuned on it."""
        return self._directory("adapter")

    @property
    def corrected(self) -> Path:
        """The LoRA for the base."""
        return self._directory("corrected")

    @property
    def selection_loss(self) -> float | None:
        """The loss per token of the base with the corrected LoRA, on the selection rows; None before it is known."""
        manifest = self.corrected / MANIFEST
        if not manifest.is_file():
            return None
        result = read_json(manifest)["result"]
        chosen = result["clamp"], result["scale"]
        compared = result.get("candidates", [])
        return next((each["nll"] for each in compared if (each["clamp"], each["scale"]) == chosen), None)

    def _directory(self, stage: str) -> Path:
        return self.root / (f"{stage}_{self.name}" if self.name else stage)


def attempts(recipe: Recipe) -> list[Attempt]:
    """Return the emulators that a recipe tries, in order."""
    settings = {"": recipe.compress, **recipe.alternatives}
    return [Attempt(Path(recipe.output), name, _of_one_loss(each, recipe.train)) for name, each in settings.items()]


def kept(recipe: Recipe) -> Attempt:
    """Return the attempt whose LoRA gives the base the lowest loss; the first one until all losses are known."""
    found = attempts(recipe)
    losses = [attempt.selection_loss for attempt in found] if recipe.alternatives else []
    known = [loss for loss in losses if loss is not None]
    return found[losses.index(min(known))] if len(known) == len(found) else found[0]


def stages(recipe: Recipe) -> list[Stage]:
    """Return the stages of a recipe, in order."""
    return [*tried(recipe), *rest(recipe)]


def tried(recipe: Recipe) -> list[Stage]:
    """Return the stages up to the corrected LoRAs, for one emulator after the other."""
    return [stage for attempt in attempts(recipe) for stage in _attempt(recipe, attempt)]


def _attempt(recipe: Recipe, attempt: Attempt) -> Iterator[Stage]:
    """Yield the stages of one emulator. All are judged on the same rows, which the first draws and none has seen."""
    data, memory = recipe.data, recipe.model.memory
    is_first = not attempt.name
    held_out = (*map(Path, data.test), *(() if is_first else (_selection_rows(recipe),)))
    which = "" if is_first else f" ({attempt.name})"
    sizing = {"memory": memory, "tuning": recipe.train} if memory else {}
    compress = CompressRequest(
        model=recipe.model.base,
        data=data.calibration or data.train,
        split=data.split,
        exclude=(*held_out, *(Path(name) for name in [data.eval] if name and not data.eval_split)),
        output=attempt.emulator,
        settings=attempt.settings if is_first else attempt.settings.model_copy(update={"selection": 0}),
        **sizing,
    )
    on_base = {"on_base": True, "base": recipe.model.base} if data.eval_base else {}
    evaluation = _evaluation(recipe).model_copy(update=on_base)
    correct = CorrectRequest(
        adapter=attempt.adapter,
        base=recipe.model.base,
        emulator=attempt.emulator,
        output=attempt.corrected,
        settings=recipe.correct,
        **({} if is_first else {"selection_data": _selection_rows(recipe)}),
    )
    yield Stage(f"make the emulator{which}", compress)
    tune = _train(recipe, str(attempt.emulator), attempt.adapter, held_out, evaluation=evaluation)
    yield Stage(f"tune a LoRA on the emulator{which}", tune)
    yield Stage(f"correct it for the base{which}", correct)


def rest(recipe: Recipe) -> list[Stage]:
    """Return the stages that follow. Which LoRA they start from is known once all are corrected."""
    attempt = kept(recipe)
    root, base, data = Path(recipe.output), recipe.model.base, recipe.data
    held_out = (*map(Path, data.test), attempt.emulator / CALIBRATION, _selection_rows(recipe))
    found = []
    final = attempt.corrected
    steps = recipe.polish and _of_one_loss(recipe.polish, recipe.train)
    if steps:
        polish = PolishRequest(
            adapter=final,
            base=base,
            data=data.train,
            split=data.split,
            exclude=held_out,
            evaluation=_evaluation(recipe),
            output=root / "polished",
            settings=steps,
        )
        found.append(Stage("polish it on the base", polish))
        final = polish.output
    if recipe.merge:
        found.append(Stage("merge it into the base", MergeRequest(adapter=final, base=base, output=root / "merged")))
    if recipe.eval is None:
        return found
    if recipe.eval.full_lora:
        full = _train(recipe, base, root / "full_lora", held_out)
        found.append(Stage("tune the base itself, the upper bound", full))
        found += [
            Stage(purpose, _train(recipe, base, root / name, held_out, **more))
            for name, purpose, more in _controls(recipe.train, steps)
        ]
    evaluate = EvaluateRequest(
        systems=_systems(recipe, attempt, {stage.name: stage.output for stage in found}),
        tasks=tuple(recipe.eval.tasks),
        output=root / "evaluation",
        limit=recipe.eval.limit,
        batch_size=recipe.eval.batch_size,
    )
    return [*found, Stage("compare all of them", evaluate)]


def _selection_rows(recipe: Recipe) -> Path:
    return attempts(recipe)[0].emulator / SELECTION


def _train(recipe: Recipe, model: str, output: Path, exclude: tuple[Path, ...], **more: Any) -> TrainRequest:
    rows = {"data": recipe.data.train, "split": recipe.data.split, "exclude": exclude}
    usual = {"evaluation": _evaluation(recipe), "settings": recipe.train}
    return TrainRequest(model=model, output=output, **{**rows, **usual, **more})


def _evaluation(recipe: Recipe) -> EvalRows:
    return EvalRows(data=recipe.data.eval, split=recipe.data.eval_split)


def _of_one_loss(settings: Any, train: TrainSettings) -> Any:
    """Return settings whose loss is that of tuning, unless they say another one."""
    if train.loss == "last" or "loss" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"loss": train.loss})


def _controls(train: TrainSettings, polish: PolishSettings | None) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Yield what polishing is compared with: name, purpose, and what differs from ordinary training of the base."""
    if polish is None:
        return
    # Steps from scratch need the learning rate of tuning; that of polishing is for a LoRA that is nearly done.
    steps = polish.model_dump(exclude={"learning_rate"}) | {"epochs": None}
    alone = TrainSettings(**{**train.model_dump(), **steps})
    yield "exact_alone", "take the exact steps alone, as a control", {"settings": alone, "exact": True}
    if train.steps:
        together = train.steps + polish.steps
        longer = train.model_copy(update={"steps": together})
        yield f"full_lora_{together}", f"tune the base itself for {together} steps", {"settings": longer}


def _systems(recipe: Recipe, attempt: Attempt, outputs: dict[str, Path]) -> tuple[System, ...]:
    """Return the systems to compare: the models and adapters that the recipe makes, in the table's order."""
    base, emulator, adapter = recipe.model.base, str(attempt.emulator), attempt.adapter
    found = [
        System(name="base", model=base),
        System(name="emulator", model=emulator),
        System(name="emulator+lora", model=emulator, adapter=adapter),
        System(name="base+uncorrected", model=base, adapter=adapter),
        System(name="base+corrected", model=base, adapter=attempt.corrected),
    ]
    if "polished" in outputs:
        found.append(System(name="base+polished", model=base, adapter=outputs["polished"]))
    if "merged" in outputs and recipe.polish is None:  # after polishing it would be what base+polished is, once more
        found.append(System(name="merged", model=str(outputs["merged"])))
    found += [
        System(name=name, model=base, adapter=output)
        for name, output in outputs.items()
        if name == "exact_alone" or name.startswith("full_lora")
    ]
    return tuple(found)
