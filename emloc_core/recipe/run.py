"""Runs a recipe: every stage in a process of its own, so that its memory is given back and its peak is its own.

A stage whose output is there already, made from the same inputs, says so and ends; an interrupted one goes on.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from emloc_core.data.rows import CALIBRATION, SELECTION
from emloc_core.errors import EmlocError
from emloc_core.files.output import MANIFEST, TIMING, read_json, write_json
from emloc_core.files.workspace import Workspace
from emloc_core.recipe.recipe import Recipe, load_recipe
from emloc_core.settings import FLAGS, MEMORY_FLAGS, MEMORY_SETTINGS, TrainSettings


@dataclass(frozen=True)
class Stage:
    """One command of a recipe.

    Attributes:
        name: of its output directory.
        purpose: one line for a person.
        argv: the command line after ``emloc``.
        output: the directory that it makes.
    """

    name: str
    purpose: str
    argv: tuple[str, ...]
    output: Path

    @property
    def state(self) -> str:
        """``there``, ``interrupted`` or ``to do``. Whether what is there matches is the stage's own check."""
        if (self.output / MANIFEST).is_file():
            return "there"
        return "interrupted" if Workspace(self.output).is_started else "to do"


def arguments(settings: BaseModel, short: dict[str, str] | None = None) -> list[str]:
    """Return the command line options that give ``settings``; values that are the default are left out."""
    found: list[str] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if value == field.get_default(call_default_factory=True):
            continue
        flag = (short or {}).get(name, f"--{name.replace('_', '-')}")
        if isinstance(value, bool):
            found.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, dict):
            found += [text for key, entry in value.items() for text in (flag, f"{key}={json.dumps(entry)}")]
        elif isinstance(value, list):
            found += [text for entry in value for text in (flag, str(entry))]
        else:
            found += [flag, str(value)]
    return found


def stages(recipe: Recipe) -> list[Stage]:
    """Return the commands of a recipe, in order."""
    root = Path(recipe.output)
    base, data = recipe.model.base, recipe.data
    emulator, adapter, corrected, merged, full = (
        root / name for name in ("emulator", "adapter", "corrected", "merged", "full_lora")
    )
    draw_from = ["--split", data.split, *(text for test in data.test for text in ("--exclude", test))]
    rows = ["--data", data.train, *draw_from]
    calibration = ["--data", data.calibration or data.train, *draw_from]
    tuning = arguments(recipe.train, FLAGS)
    held_out = [text for name in (CALIBRATION, SELECTION) for text in ("--exclude", str(emulator / name))]

    def stage(purpose: str, output: Path, command: str, *argv: str | Path) -> Stage:
        return Stage(output.name, purpose, (command, *map(str, argv), "-o", str(output)), output)

    found = [
        stage("make the emulator", emulator, "compress", base, *calibration, *arguments(recipe.compress)),
        stage("tune a LoRA on the emulator", adapter, "train", emulator, *rows, *tuning),
        stage("carry it over to the base", corrected, "correct", adapter, "--base", base,
              "--emulator", emulator, *arguments(recipe.correct)),
    ]  # fmt: skip
    if recipe.merge:
        found.append(stage("fold it into the base", merged, "merge", corrected, "--base", base))
    if recipe.eval is None:
        return found
    systems: list[str | Path] = ["--base", base, "--emulator", emulator, "--adapter", adapter, "--corrected", corrected]
    if recipe.merge:
        systems += ["--merged", merged]
    if recipe.eval.full_lora:
        found.append(stage("tune the base itself, the upper bound", full, "train", base, *rows, *tuning, *held_out))
        systems += ["--full-lora", full]
    sizes = ["--batch-size", str(recipe.eval.batch_size)]
    if recipe.eval.limit:
        sizes += ["--limit", str(recipe.eval.limit)]
    evaluation = root / "evaluation"
    found.append(stage("compare all of them", evaluation, "eval", *recipe.eval.tasks, *systems, *sizes))
    return found


def fit(recipe: Recipe) -> Recipe:
    """Return the recipe with the ratio that its ``model.memory``, where it has one, asks for, by ``emloc plan``.

    Raises:
        EmlocError: no emulator's tuning fits, and what would; or the model cannot be planned.
    """
    if recipe.model.memory is None:
        return recipe
    data, train = recipe.data, recipe.train
    argv = ["plan", recipe.model.base, "--memory", recipe.model.memory, "--data", data.train, "--split", data.split]
    if train.max_length:
        argv += ["--max-length", str(train.max_length)]
    ratio = _ask(*argv, *arguments(TrainSettings(**train.model_dump(include=set(MEMORY_SETTINGS))), MEMORY_FLAGS))[
        "ratio"
    ]
    return recipe.model_copy(update={"compress": recipe.compress.model_copy(update={"ratio": ratio})})


def run_recipe(
    path: Path, overrides: Iterable[str] = (), announce: Callable[[int, int, Stage], None] = lambda *_: None
) -> dict[str, Any]:
    """Run all stages of the recipe at ``path``; return what :func:`summarise` wrote.

    Raises:
        EmlocError: from the recipe, or a stage failed; it has said why on stderr.
    """
    recipe = fit(load_recipe(path, overrides))
    planned = stages(recipe)
    Path(recipe.output).mkdir(parents=True, exist_ok=True)
    for index, stage in enumerate(planned):
        announce(index, len(planned), stage)
        code = subprocess.run(
            [sys.executable, "-m", "emloc_core", *stage.argv], stdout=sys.stderr, check=False
        ).returncode
        if code:
            raise EmlocError(
                f"The stage '{stage.name}' failed (exit code {code}); the stages before it are kept.",
                "Mend what it says above, and run the same command again.",
            )
    return summarise(recipe, planned)


def sizes(recipe: Recipe) -> dict[str, Any]:
    """Return what ``emloc compress --dry-run --json`` says of the recipe's first stage: rows, ranks, bytes.

    Raises:
        EmlocError: the first stage could not run as the recipe says.
    """
    return _ask(*stages(recipe)[0].argv, "--dry-run")


def _ask(*argv: str) -> dict[str, Any]:
    """Return what a command says with ``--json``, from a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-m", "emloc_core", *argv, "--json"], check=False, capture_output=True, text=True
    )
    if answer.returncode:
        lines = answer.stderr.strip().splitlines()
        raise EmlocError(lines[-1].removeprefix("emloc: error: ") if lines else f"emloc {argv[0]} failed.")
    content: dict[str, Any] = json.loads(answer.stdout)
    return content


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
        label: [(entry["step"], entry["loss"]) for entry in read_json(root / name / "log.json") if "loss" in entry]
        for name, label in (("adapter", "on the emulator"), ("full_lora", "on the base (full LoRA)"))
        if name in manifests
    }
    figure(root / "figure.png", histories, manifests["emulator"]["result"]["linears"])
    if "evaluation" in manifests:
        results.update(read_json(root / "evaluation" / "results.json"))
        (root / "table.md").write_text(report.markdown(results["systems"], results["metrics"]), encoding="utf-8")
    write_json(root / "results.json", results)
    return results
