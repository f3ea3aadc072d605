"""A recipe: the whole way from a base model to a table, in one TOML file."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from emloc_core.errors import EmlocError
from emloc_core.files.output import read_toml
from emloc_core.settings import CompressSettings, CorrectSettings, PolishSettings, Settings, TrainSettings, explain

#: What is a file by its suffix: rows, and lm-eval's tasks.
FILES = {".jsonl", ".json", ".parquet", ".yaml", ".yml"}
#: What may be a name and no path: of a model or data set of the hub, or of a task that lm-eval brings along.
MODEL_ID = re.compile(r"[^/]+/[^/]+")
DATA_ID = re.compile(r"[^/]+(/[^/]+)?")
TASK_NAME = re.compile(r"[^/]+")


class ModelSection(Settings):
    """Which model."""

    base: str = Field(description="Local directory or hub id.")
    memory: str | None = Field(
        None,
        description="What tuning may use on a GPU (24GiB, say): instead of compress.ratio, the largest that fits.",
    )


class DataSection(Settings):
    """Whose data."""

    train: str = Field(description="JSONL, JSON or Parquet file, or hub data set: calibration, selection and tuning.")
    split: str = Field("train", description="Of a hub data set.")
    calibration: str | None = Field(
        None, description="File of other rows for calibration and selection; without it they are drawn from ``train``."
    )
    test: list[str] = Field([], description="Files of rows that are never tuned on.")


class EvalSection(Settings):
    """How the systems are compared."""

    tasks: list[str] = Field(min_length=1, description="lm-eval task files, or names of bundled tasks.")
    limit: int | None = Field(None, ge=1, description="Use that many rows of every task.")
    batch_size: int = Field(8, ge=1, description="Rows at a time.")
    full_lora: bool = Field(False, description="Tune the base itself too, as the upper bound, where it fits.")


class Recipe(Settings):
    """All stages. Paths are relative to the recipe's file."""

    output: str = Field("emloc-run", description="Directory of all outputs.")
    model: ModelSection
    data: DataSection
    compress: CompressSettings = CompressSettings()
    train: TrainSettings = TrainSettings()
    correct: CorrectSettings = CorrectSettings()
    polish: PolishSettings | None = Field(None, description="Exact steps on the base, after the correction; optional.")
    merge: bool = Field(True, description="Write the merged checkpoint.")
    eval: EvalSection | None = Field(None, description="Without it nothing is compared.")

    @model_validator(mode="after")
    def _one_size(self) -> "Recipe":
        if self.model.memory is not None and "ratio" in self.compress.model_fields_set:
            raise ValueError("model.memory and compress.ratio both say how large the emulator is; give one of them")
        return self

    @model_validator(mode="after")
    def _rows_to_compare_on(self) -> "Recipe":
        if self.correct.clamp == "auto" and not self.compress.selection:
            raise ValueError(
                "correct.clamp = 'auto' compares on held-out rows, and compress.selection = 0 holds out none; hold "
                "some out, or set correct.clamp to a number or 'none'"
            )
        return self


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a TOML file.
        overrides: ``section.key=value``, the value in TOML or plain text.

    Raises:
        EmlocError: the file cannot be read, or settings are wrong: all of them are named.
    """
    content = read_toml(path, "recipe")
    for override in overrides:
        _apply(content, override)
    try:
        recipe = Recipe(**content)
    except ValidationError as error:
        raise EmlocError(f"{path}: {explain(error, Recipe)}", "Mend these settings.") from None
    return _absolute(recipe, path.resolve().parent)


def _apply(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise EmlocError(f"{override!r} is no setting.", "Write it as section.key=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = name.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise EmlocError(f"{override!r} sets a part of {section!r}, which is a value.", "Name a section's key.")
    content[key] = value


def _absolute(recipe: Recipe, root: Path) -> Recipe:
    """Return the recipe with all paths made absolute, whether there is something at them or not.

    A text stays as it is only where it may be a name, does not look like a path, and nothing beside the recipe has it.
    """

    def place(text: str, names: re.Pattern[str]) -> str:
        if "\0" in text:
            raise EmlocError(f"The recipe names {text!r}, which no file can be called.", "Correct it.")
        path = root / Path(text).expanduser()
        is_path = text.startswith((".", "~")) or Path(text).suffix in FILES or path.exists()
        return text if names.fullmatch(text) and not is_path else str(path)

    data = {
        "train": place(recipe.data.train, DATA_ID),
        "test": [place(test, DATA_ID) for test in recipe.data.test],
        "calibration": recipe.data.calibration and place(recipe.data.calibration, DATA_ID),
    }
    changes: dict[str, Any] = {
        "output": str(root / Path(recipe.output).expanduser()),
        "model": recipe.model.model_copy(update={"base": place(recipe.model.base, MODEL_ID)}),
        "data": recipe.data.model_copy(update=data),
    }
    if recipe.eval:
        tasks = [place(task, TASK_NAME) for task in recipe.eval.tasks]
        changes["eval"] = recipe.eval.model_copy(update={"tasks": tasks})
    return recipe.model_copy(update=changes)
