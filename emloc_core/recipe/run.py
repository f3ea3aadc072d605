"""Runs a recipe: each stage in its own process, so that its memory is released and its peak measured separately.

A stage whose output already exists, made from the same inputs, is skipped; an interrupted one resumes.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.hub import push
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.output import TIMING, require_directory
from emloc_core.model.cap import gpu_cap
from emloc_core.processes.call import ProcessDiedError, call
from emloc_core.recipe.answers import answers_of
from emloc_core.recipe.decided import decided
from emloc_core.recipe.recipe import Recipe, load_recipe
from emloc_core.recipe.stages import Stage, compress_request, directory, has, stages
from emloc_core.requests import EvalRows
from emloc_core.settings import PolishSettings
from emloc_core.stages.precheck import check_names, check_rows
from emloc_core.stages.progress import ProgressEvent
from emloc_core.stages.rows import held_out_share

#: Functions that run, describe and check a stage in its own process.
PERFORM, DESCRIBE = "emloc_core.cli.stage:perform", "emloc_core.stages.perform:describe"
CHECK, BUNDLED = "emloc_core.tuning.targets:check", "emloc_core.evaluation.tasks:require_bundled"
#: Settings of tuning that name parts of the model or of TRL.
_NAMING = ("extra", "target_modules", "lora_experts", "rank_pattern", "layers_to_transform", "modules_to_save")

#: Keeps the stages from showing progress.
_QUIET = {"EMLOC_VERBOSITY": "quiet"}
_LOGGER = logging.getLogger("emloc.recipe")


def run_recipe(
    path: Path,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    announce: Callable[[int, int, Stage], None] = lambda *_: None,
    progress: Callable[[ProgressEvent], Any] | None = None,
    memory: str | None = None,
) -> dict[str, Any]:
    """Run all stages of the recipe at ``path``; return the results of :func:`summarise`.

    Args:
        overrides: see :func:`emloc_core.recipe.recipe.load_recipe`.
        announce: called before each stage, with its index and the number of stages.
        progress: called with every event of every stage; the stages' output then goes to a file, which is kept
            beside the outputs if a stage fails.
        memory: GPU memory that a stage may use; by default the recipe's.

    Raises:
        EmlocError: the recipe is wrong, or a stage, which is named, failed. Earlier stages are kept.
    """
    recipe = load_recipe(path, overrides)
    require_named(recipe)
    require_tuning(recipe)
    capped = gpu_cap(memory or recipe.model.memory)
    recipe = decided(recipe, _LOGGER.info) if progress else decided(recipe)
    planned = stages(recipe)
    Path(recipe.output).mkdir(parents=True, exist_ok=True)
    for index, stage in enumerate(planned):
        announce(index, len(planned), stage)
        try:
            _perform(stage, index + 1, len(planned), progress, capped)
        except EmlocError as error:
            message = f"The stage '{stage.name}' failed: {error}"
            raise EmlocError(message, "Earlier stages are kept.", code=error.code, resumable=error.resumable) from None
    results = summarise(recipe, planned)
    if recipe.answers:
        last = "polished" if recipe.polish else "corrected" if recipe.makes_emulator else "adapter"
        adapter = directory(recipe, last)
        log = Path(os.devnull) if progress else None
        how = recipe.answers.model_dump()
        results["answers"] = answers_of(recipe.model.base, adapter, read=_reading(recipe), log=log, **how)
    if recipe.push:
        results["pushed"] = push(Path(recipe.output) / results["final"], recipe.push)
    write_json(Path(recipe.output) / "results.json", results)  # again, with the upload and the answers
    return results


def _perform(
    stage: Stage,
    number: int,
    total: int,
    progress: Callable[[ProgressEvent], Any] | None,
    environment: Mapping[str, str],
) -> None:
    """Run a stage in its own process, and pass on its events."""
    log = stage.output.with_name(f".{stage.name}.log")
    shown: dict[str, Any] = {"log": log} if progress else {}
    environment = {**environment, **(_QUIET if progress else {})}
    try:
        for answer in call(PERFORM, {"request": stage.request.to_json()}, environment=environment, **shown):
            if progress and answer != "done":
                progress(ProgressEvent(**{**answer, "number": number, "stages": total}))
    except ProcessDiedError as error:
        if not progress:
            raise
        raise EmlocError(f"{error.args[0]} (log: {log})", error.fix, code=error.code, resumable=True) from None
    log.unlink(missing_ok=True)


def require_named(recipe: Recipe) -> None:
    """Refuse files, tasks and corrections that cannot be used, which the last stages would find hours later."""
    from emloc_core.evaluation.tasks import read_task_file

    require_directory(Path(recipe.output))
    bundled = []
    for task in recipe.eval.tasks if recipe.eval else []:
        if Path(task).is_absolute():  # a recipe's task files are
            read_task_file(Path(task))
        else:
            bundled.append(task)
    check_names(recipe.correct)
    for rows in (recipe.data.train, recipe.data.eval):
        check_rows(rows)
    held_out_share(EvalRows(data=recipe.data.eval, split=recipe.data.eval_split), recipe.data.train)
    if recipe.answers:
        load_rows(recipe.answers.rows, **_reading(recipe))
    if bundled and not has(recipe, "evaluation"):
        list(call(BUNDLED, {"tasks": bundled}))


def _reading(recipe: Recipe) -> dict[str, Any]:
    """Return how the rows of a recipe are read."""
    return {"split": recipe.data.split, "columns": dict(recipe.data.columns)}


def require_tuning(recipe: Recipe) -> None:
    """Refuse settings of tuning that name what the model, TRL or this machine lacks, before the emulator is made."""
    polish = recipe.polish or PolishSettings()
    if has(recipe, "adapter") and (recipe.polish is None or has(recipe, "polished")):
        return
    tracked = any(part.report_to != "none" for part in (recipe.train, polish))
    if tracked or polish.extra or any(getattr(recipe.train, name) for name in _NAMING):
        settings, after = (part.model_dump(mode="json", exclude_unset=True) for part in (recipe.train, polish))
        list(call(CHECK, {"model": recipe.model.base, "settings": settings, "polish": after}))


def describe(recipe: Recipe) -> dict[str, Any]:
    """Return the output of ``emloc compress --dry-run --json`` for the emulator: rows, ranks, bytes.

    Raises:
        EmlocError: the emulator cannot be made.
    """
    (content,) = call(DESCRIBE, {"request": compress_request(recipe).to_json()})
    return content


def summarise(recipe: Recipe, done: list[Stage]) -> dict[str, Any]:
    """Write ``results.json`` and ``table.md`` beside the stages' directories; return the results."""
    from emloc_core.report import table as report

    root = Path(recipe.output)
    manifests = {stage.name: read_json(stage.output / MANIFEST) for stage in done}
    results: dict[str, Any] = {
        "stages": {stage.name: read_json(stage.output / TIMING) for stage in done},
        "final": next(name for name in ("merged", "polished", "corrected", "adapter") if name in manifests),
    }
    if recipe.makes_emulator:
        results["compression"] = {key: manifests["emulator"]["result"][key] for key in ("bytes", "parameters")}
        results["correction"] = manifests["corrected"]["result"]
    if "evaluation" in manifests:
        results.update(read_json(root / "evaluation" / "results.json"))
        (root / "table.md").write_text(report.markdown(results["systems"], results["metrics"]), encoding="utf-8")
    write_json(root / "results.json", results)
    return results
