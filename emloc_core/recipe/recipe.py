"""A recipe: all stages from a base model to a table of results, in one TOML file."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike, fspath
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from emloc_core.errors import EmlocError, validated
from emloc_core.files.documents import read_toml
from emloc_core.files.hub import check_repository
from emloc_core.requests import SKIP
from emloc_core.settings import (
    Columns,
    CompressSettings,
    CorrectSettings,
    PolishSettings,
    Settings,
    SplitOrShare,
    TrainSettings,
)

#: Suffixes of files: rows, and lm-eval's tasks.
FILES = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".zst", ".yaml", ".yml"}
#: What may be a name instead of a path: a hub model or dataset, or a task bundled with lm-eval.
MODEL_ID = re.compile(r"[^/]+/[^/]+")
DATA_ID = re.compile(r"[^/]+(/[^/]+)?")
TASK_NAME = re.compile(r"[^/]+")
#: The end of the names of a round's directories; the last round's have none.
ROUND = re.compile(r"_round(\d+)$")


class ModelSection(Settings):
    """The model."""

    base: str = Field(description="Local directory or hub id.")
    memory: str | None = Field(
        None,
        description="Memory for tuning, such as 24GiB. An ordinary LoRA is trained if it fits; otherwise the best "
        "emulator that does, instead of compress.ratio.",
    )
    headroom: str | None = Field(
        None,
        description="How much of ``memory`` to keep free: a size, a share such as 8%, or 0; by default 5%, up to 1GiB.",
    )


class DataSection(Settings):
    """The data."""

    train: str | list[str] | dict[str, Annotated[float, Field(gt=0)]] = Field(
        description="Rows for calibration, selection and tuning: a JSONL, JSON, CSV or Parquet file, a saved or hub "
        "dataset; a list of several, or a table of them with their weights."
    )
    split: str = Field("train", description="Split of a saved or hub dataset.")
    columns: Columns = Field({}, description="Your names for the usual columns, such as {prompt = 'question'}.")
    skip_bad_rows: bool = Field(False, description=SKIP)
    calibration: str | None = Field(
        None, description="File with other rows for calibration and selection; by default they come from ``train``."
    )
    eval: str | None = Field(
        None, description="Rows to evaluate while tuning; they are never tuned on, and the best checkpoint is kept."
    )
    eval_split: SplitOrShare | None = Field(
        None, description="Split of these rows or, without ``eval``, the share of the rows to hold out, such as 0.05."
    )
    eval_base: bool = Field(
        False, description="Also evaluate the base, streamed, and keep the checkpoint that is best there."
    )
    test: list[str] = Field([], description="Files with rows that are never tuned on.")

    @field_validator("train")
    @classmethod
    def _names_rows(cls, train: Any) -> Any:
        if train in ([], {}):
            raise ValueError("name at least one file or dataset")
        return train


class AnswersSection(Settings):
    """Rows that the model answers before and after tuning."""

    rows: str = Field(description="File with the rows; put it into data.test too, so that they are never tuned on.")
    max_new_tokens: int = Field(64, ge=1, description="Maximum tokens per answer.")
    guidance: float | None = Field(None, ge=0, description="Guidance scale for pictures; by default the pipeline's.")


class EvalSection(Settings):
    """How the systems are compared."""

    tasks: list[str] = Field(min_length=1, description="lm-eval task files, or names of bundled tasks.")
    systems: list[str] | None = Field(
        None,
        min_length=1,
        description="Compare only these of the systems that the recipe makes, such as base and base+corrected.",
    )
    limit: int | None = Field(None, ge=1, description="Use only this many rows of each task.")
    batch_size: int = Field(8, ge=1, description="Rows per batch. Halved where memory runs out.")
    full_lora: bool = Field(False, description="Also tune the base itself, as the upper bound, if it fits.")


class Recipe(Settings):
    """All stages. Paths are relative to the recipe's file."""

    output: str = Field("emloc-run", description="Directory of all outputs.")
    way: Literal["emulator", "lora", "exact"] | None = Field(
        None,
        description="What is tuned: 'emulator', a LoRA on an emulator, which is corrected; 'lora', an ordinary LoRA on "
        "the model; 'exact', a LoRA by exact steps alone. By default an emulator; with model.memory, what fits best.",
    )
    model: ModelSection
    data: DataSection
    compress: CompressSettings = CompressSettings()
    train: TrainSettings = TrainSettings()
    rounds: int = Field(
        1,
        ge=1,
        description="Emulators that a LoRA is tuned on in turn, in equal shares of the steps. Each is fitted with the "
        "LoRA so far, and undoes what that learned of the errors of the one before.",
    )
    correct: CorrectSettings = CorrectSettings()
    polish: PolishSettings | None = Field(None, description="Exact steps on the base, after the correction; optional.")
    merge: bool = Field(True, description="Write the merged checkpoint.")
    answers: AnswersSection | None = Field(
        None, description="Rows that the model answers before tuning and after it, into answers.json; optional."
    )
    eval: EvalSection | None = Field(None, description="Evaluation; without it nothing is compared.")
    push: str | None = Field(
        None,
        description="Private repository on the hub, organisation/name, for the merged model or, with merge = false, "
        "the last adapter.",
    )

    @property
    def makes_emulator(self) -> bool:
        """Whether a LoRA is tuned on an emulator; if not, on the model itself."""
        return self.way in (None, "emulator")

    @model_validator(mode="after")
    def _is_possible(self) -> "Recipe":
        if (problem := next(self._problems(), None)) is not None:
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        if self.model.memory is not None and "ratio" in self.compress.model_fields_set:
            yield "model.memory and compress.ratio both set the emulator's size; give one of them"
        if not self.makes_emulator and self.polish is not None:
            yield f"polish follows an emulator's LoRA, but way is {self.way!r}; leave it out"
        if (self.way == "exact" or self.polish is not None) and not self.train.can_be_exact:
            yield (
                "exact steps (polish) support only the likelihood of answers, and only LoRAs: leave them out, or "
                "train.objective and the modules that are trained themselves"
            )
        if self.rounds > 1:
            yield from self._problems_of_rounds()
        yield from self._problems_of_evaluation()
        if self.push is not None:
            try:
                check_repository(self.push)
            except EmlocError as error:
                yield str(error)
        if self.correct.clamp == "auto" and not self.compress.selection:
            yield (
                "correct.clamp = 'auto' compares on held-out rows, but compress.selection = 0 holds out none; hold "
                "some out, or set correct.clamp to a number or 'none'"
            )

    def _problems_of_rounds(self) -> Iterator[str]:
        if not self.makes_emulator:
            yield f"rounds are tuned on emulators, but way is {self.way!r}; leave one of them out"
        if not self.train.can_be_exact or self.train.lora_experts:
            yield (
                "a second round supports only the likelihood of answers, and only LoRAs on Linears: set rounds = 1, or "
                "leave out train.objective, the modules that are trained themselves and lora_experts"
            )
        if self.train.steps is not None and self.train.steps < self.rounds:
            yield f"train.steps = {self.train.steps} are fewer than rounds = {self.rounds}; lower rounds"

    def _problems_of_evaluation(self) -> Iterator[str]:
        evaluates = self.data.eval is not None or self.data.eval_split is not None
        if evaluates and self.train.learns_preferences:
            yield "data.eval: preferences are not evaluated while tuning; leave out the rows to evaluate"
        needs = {
            "train.patience needs": self.train.patience,
            "polish.patience needs": self.polish and self.polish.patience,
            "data.eval_base needs": self.data.eval_base,
        }
        for option, value in needs.items():
            if value and not evaluates:
                yield f"{option} rows to evaluate, but there are none; give data.eval"


def load_recipe(path: Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe.

    Args:
        overrides: ``section.key=value``, the value in TOML or plain text; or sections with the values of their keys.

    Raises:
        EmlocError: the file cannot be read, or settings are wrong; names all of them.
    """
    content = read_toml(path, "recipe")
    if isinstance(overrides, Mapping):
        _merge(content, overrides)
    else:
        for override in overrides:
            _apply(content, override)
    recipe = validated(Recipe, content, "Correct these settings.", str(path))
    return _absolute(recipe, path.resolve().parent)


def _merge(content: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(content.get(name), dict):
            _merge(content[name], value)
        else:
            content[name] = fspath(value) if isinstance(value, PathLike) else value


def _apply(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise _no_override(override)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = _keys(name, override)
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise EmlocError(
                f"{override!r} sets a key of {section!r}, which is not a section.", "Name a section's key."
            )
    content[key] = value


def _keys(name: str, override: str) -> list[str]:
    """Return the parts of a TOML key, in which a part with a dot is quoted."""
    parts = []
    try:
        nested: Any = tomllib.loads(f"{name} = 0")
        while isinstance(nested, dict):
            ((part, nested),) = nested.items()
            parts.append(part)
    except ValueError:  # no TOML, or a comment
        raise _no_override(override) from None
    return parts


def _no_override(override: str) -> EmlocError:
    return EmlocError(
        f"{override!r} is not a setting.", "Write it as section.key=value, and quote a part of the key that has a dot."
    )


def _absolute(recipe: Recipe, root: Path) -> Recipe:
    """Return the recipe with all paths absolute, whether they exist or not.

    A text stays unchanged only if it may be a name, does not look like a path, and names no file beside the recipe.
    """

    def resolve(text: str, names: re.Pattern[str]) -> str:
        if "\0" in text:
            raise EmlocError(f"The recipe names {text!r}, which cannot be a file's name.", "Correct it.")
        path = root / expanduser(text)  # which leaves an unknown ~name as it is
        is_path = text.startswith((".", "~")) or Path(text).suffix in FILES or path.exists()
        return text if names.fullmatch(text) and not is_path else str(path)

    def sources(names: str | list[str] | dict[str, float]) -> str | list[str] | dict[str, float]:
        if isinstance(names, str):
            return resolve(names, DATA_ID)
        if isinstance(names, list):
            return [resolve(name, DATA_ID) for name in names]
        return {resolve(name, DATA_ID): weight for name, weight in names.items()}

    data = {
        "train": sources(recipe.data.train),
        "test": [resolve(test, DATA_ID) for test in recipe.data.test],
        "eval": recipe.data.eval and resolve(recipe.data.eval, DATA_ID),
        "calibration": recipe.data.calibration and resolve(recipe.data.calibration, DATA_ID),
    }
    changes: dict[str, Any] = {
        "output": str(root / expanduser(recipe.output)),
        "model": recipe.model.model_copy(update={"base": resolve(recipe.model.base, MODEL_ID)}),
        "data": recipe.data.model_copy(update=data),
    }
    if recipe.answers:
        changes["answers"] = recipe.answers.model_copy(update={"rows": resolve(recipe.answers.rows, DATA_ID)})
    if recipe.eval:
        tasks = [resolve(task, TASK_NAME) for task in recipe.eval.tasks]
        changes["eval"] = recipe.eval.model_copy(update={"tasks": tasks})
    return recipe.model_copy(update=changes)
