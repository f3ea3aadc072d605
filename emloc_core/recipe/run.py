"""Runs a recipe: each stage in its own process, so that its memory is released and its peak measured separately.

A stage whose output already exists, made from the same inputs, is skipped; an interrupted one resumes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.data.rows import CALIBRATION, SELECTION
from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.hub import push
from emloc_core.files.output import MANIFEST, TIMING
from emloc_core.files.workspace import Workspace
from emloc_core.process import call
from emloc_core.recipe.recipe import Recipe, load_recipe
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
from emloc_core.settings import PolishSettings, TrainSettings

#: Functions that run and describe a stage in its own process.
PERFORM, DESCRIBE = "emloc_core.cli.stage:perform", "emloc_core.cli.stage:describe"


#: Stages whose losses are drawn, and how they are called.
_HISTORIES = {
    "adapter": "on the emulator",
    "polished": "polished on the base",
    "full_lora": "on the base (full LoRA)",
}


#: Losses in a log, and what they are of.
_LOSSES = {"loss": "", "eval_loss": ", held-out rows", "eval_base_loss": ", held-out rows on the base"}


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


def stages(recipe: Recipe) -> list[Stage]:
    """Return the stages of a recipe, in order."""
    root = Path(recipe.output)
    base, data, memory = recipe.model.base, recipe.data, recipe.model.memory
    emulator, adapter, corrected, polished, merged, full = (
        root / name for name in ("emulator", "adapter", "corrected", "polished", "merged", "full_lora")
    )
    test = tuple(map(Path, data.test))
    evaluation = EvalRows(data=data.eval, split=data.eval_split)
    held_out = (*test, emulator / CALIBRATION, emulator / SELECTION)
    sizing = {"memory": memory, "tuning": recipe.train} if memory else {}

    def train(model: str, output: Path, exclude: tuple[Path, ...] = test, **more: Any) -> TrainRequest:
        rows = {"data": data.train, "split": data.split, "exclude": exclude, "evaluation": evaluation}
        return TrainRequest(model=model, output=output, **{**rows, "settings": recipe.train, **more})

    compress = CompressRequest(
        model=base,
        data=data.calibration or data.train,
        split=data.split,
        exclude=(*test, *(Path(name) for name in [data.eval] if name and not data.eval_split)),
        output=emulator,
        settings=_of_one_loss(recipe.compress, recipe.train),
        **sizing,
    )
    on_base = evaluation.model_copy(update={"on_base": True, "base": base}) if data.eval_base else evaluation
    correct = CorrectRequest(adapter=adapter, base=base, emulator=emulator, output=corrected, settings=recipe.correct)
    found = [
        Stage("make the emulator", compress),
        Stage("tune a LoRA on the emulator", train(str(emulator), adapter, evaluation=on_base)),
        Stage("correct it for the base", correct),
    ]
    final = corrected
    steps = recipe.polish and _of_one_loss(recipe.polish, recipe.train)
    if steps:
        polish = PolishRequest(
            adapter=corrected,
            base=base,
            data=data.train,
            split=data.split,
            exclude=held_out,
            evaluation=evaluation,
            output=polished,
            settings=steps,
        )
        found.append(Stage("polish it on the base", polish))
        final = polished
    if recipe.merge:
        found.append(Stage("merge it into the base", MergeRequest(adapter=final, base=base, output=merged)))
    if recipe.eval is None:
        return found
    if recipe.eval.full_lora:
        found.append(Stage("tune the base itself, the upper bound", train(base, full, held_out)))
        found += [
            Stage(purpose, train(base, root / name, held_out, **more))
            for name, purpose, more in _controls(recipe.train, steps)
        ]
    evaluate = EvaluateRequest(
        systems=_systems(recipe, {stage.name: stage.output for stage in found}),
        tasks=tuple(recipe.eval.tasks),
        output=root / "evaluation",
        limit=recipe.eval.limit,
        batch_size=recipe.eval.batch_size,
    )
    return [*found, Stage("compare all of them", evaluate)]


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


def _systems(recipe: Recipe, outputs: dict[str, Path]) -> tuple[System, ...]:
    """Return the systems to compare: the models and adapters that the recipe makes, in the table's order."""
    base, emulator, adapter = recipe.model.base, str(outputs["emulator"]), outputs["adapter"]
    found = [
        System(name="base", model=base),
        System(name="emulator", model=emulator),
        System(name="emulator+lora", model=emulator, adapter=adapter),
        System(name="base+uncorrected", model=base, adapter=adapter),
        System(name="base+corrected", model=base, adapter=outputs["corrected"]),
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


def run_recipe(
    path: Path, overrides: Iterable[str] = (), announce: Callable[[int, int, Stage], None] = lambda *_: None
) -> dict[str, Any]:
    """Run all stages of the recipe at ``path``; return the results of :func:`summarise`.

    Raises:
        EmlocError: the recipe is wrong, or a stage failed; names it. Earlier stages are kept.
    """
    recipe = load_recipe(path, overrides)
    planned = stages(recipe)
    Path(recipe.output).mkdir(parents=True, exist_ok=True)
    for index, stage in enumerate(planned):
        announce(index, len(planned), stage)
        try:
            list(call(PERFORM, {"request": stage.request.to_json()}))
        except EmlocError as error:
            told = f"The stage '{stage.name}' failed: {error}"
            raise EmlocError(told, "Earlier stages are kept.", code=error.code, resumable=error.resumable) from None
    results = summarise(recipe, planned)
    if recipe.push:
        final = next(name for name in ("merged", "polished", "corrected") if name in results["stages"])
        results["pushed"] = push(Path(recipe.output) / final, recipe.push)
    return results


def sizes(recipe: Recipe) -> dict[str, Any]:
    """Return the output of ``emloc compress --dry-run --json`` for the recipe's first stage: rows, ranks, bytes.

    Raises:
        EmlocError: the first stage could not run.
    """
    (content,) = call(DESCRIBE, {"request": stages(recipe)[0].request.to_json()})
    found: dict[str, Any] = content
    return found


def summarise(recipe: Recipe, planned: list[Stage]) -> dict[str, Any]:
    """Write ``results.json``, ``table.md`` and ``figure.png`` beside the stages' directories; return the results."""
    from emloc_core.report import table as report
    from emloc_core.report.figure import figure

    root = Path(recipe.output)
    manifests = {stage.name: read_json(stage.output / MANIFEST) for stage in planned}
    results: dict[str, Any] = {
        "stages": {stage.name: read_json(stage.output / TIMING) for stage in planned},
        "compression": {key: manifests["emulator"]["result"][key] for key in ("bytes", "parameters")},
        "correction": manifests["corrected"]["result"],
    }
    histories = {
        label + of: [(entry["step"], entry[loss]) for entry in log if loss in entry]
        for name, label in _HISTORIES.items()
        if name in manifests
        for log in [read_json(root / name / "log.json")]
        for loss, of in _LOSSES.items()
    }
    figure(root / "figure.png", histories, manifests["emulator"]["result"]["linears"])
    if "evaluation" in manifests:
        results.update(read_json(root / "evaluation" / "results.json"))
        (root / "table.md").write_text(report.markdown(results["systems"], results["metrics"]), encoding="utf-8")
    write_json(root / "results.json", results)
    return results
