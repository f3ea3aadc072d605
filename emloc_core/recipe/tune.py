"""From a model and rows to a tuned model in one call: the plan writes a recipe, which is run.

The directory holds the recipe, the request, the held-out rows, and the outputs of all stages. The same call resumes;
``emloc run DIRECTORY/recipe.toml`` runs the recipe as you have edited it.
"""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field, field_validator

from emloc_core.data.images import IMAGES
from emloc_core.data.mixture import weights
from emloc_core.data.row import Row
from emloc_core.data.rows import (
    EVALUATED,
    HELD_OUT,
    NO_RENAMING,
    ROWS,
    SKIPPED,
    TUNE_REQUEST,
    Skipped,
    digest,
    load_rows,
    skipped_warnings,
    write_rows,
    write_skipped,
)
from emloc_core.data.sets import draw
from emloc_core.errors import EmlocError, validated
from emloc_core.files.card import CARD
from emloc_core.files.documents import read_object, write_json, write_text
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.output import differences
from emloc_core.recipe.decided import decided
from emloc_core.recipe.page import write_page
from emloc_core.recipe.recipe import AnswersSection, DataSection, ModelSection, Recipe, load_recipe
from emloc_core.recipe.run import require_tuning, run_recipe
from emloc_core.requests import COLUMNS, SKIP, EvalRows, Rows
from emloc_core.settings import FREE, Columns, CompressSettings, Settings, TrainSettings
from emloc_core.stages.rows import held_out_share

RECIPE, PAGE = "recipe.toml", "report.html"
#: What is written for them, before the request is.
_OF_ROWS = {ROWS, EVALUATED, SKIPPED, IMAGES}
_ELSEWHERE = "Choose another output directory, or remove this one."
#: Number of rows that are never tuned on, and answered before and after.
_ANSWERED = 5
#: What may be beside the stages' directories, besides the final one.
_HERE = {
    "recipe.toml": "what was decided, to edit and run again: `emloc run recipe.toml`",
    "report.html": "memory, losses and versions, on one page",
    "answers.json": "answers to held-out rows, before and after",
    "held_out.jsonl": "these rows, which were never tuned on",
    "skipped_rows.jsonl": "rows that could not be used, and why",
}


class Tune(Settings):
    """The request of ``emloc tune``.

    ``memory`` may be ``free``: the free memory of the device that this machine tunes on.
    """

    model: str = Field(description="Directory or hub id.")
    data: Rows = Field(description="Rows of the task.")
    output: Path = Field(description="Directory of all outputs.")
    memory: str = Field(FREE, description="Memory to tune in, such as 24GiB.")
    headroom: str | None = Field(None, description="How much of `memory` to keep free, such as 2GiB, 8% or 0.")
    split: str = Field("train", description="Split of a saved or hub dataset.")
    columns: Columns = Field({}, description=COLUMNS)
    skip_bad_rows: bool = Field(False, description=SKIP)
    evaluation: EvalRows = Field(EvalRows(), description="Rows to evaluate while tuning, by name.")
    paper: bool = Field(False, description="Make the emulator as in the paper, for reference.")
    merge: bool = Field(False, description="Write the merged model too.")
    settings: TrainSettings = TrainSettings()

    @field_validator("evaluation")
    @classmethod
    def _base_is_the_model(cls, rows: EvalRows) -> EvalRows:
        if rows.base is not None:
            raise ValueError("the base that is evaluated is the model that is tuned: leave out `base`")
        return rows

    def run(self, tell: Callable[[str], None] = lambda _: None, **reporting: Any) -> dict[str, Any]:
        """Plan and write the recipe, or take the existing one; run it; return the results of :func:`run_recipe`.

        Args:
            tell: called with each line that says what is decided, and why.
            reporting: ``announce`` and ``progress`` of :func:`run_recipe`.

        Raises:
            EmlocError: something else is in the directory, the model or the rows cannot be used, no way to tune fits,
                or a stage failed; the message names it, and earlier stages are kept.
        """
        if self.started() is None:
            recipe, lines = self.plan()
            for line in lines:
                tell(line)
            self._write(recipe, lines)
        results = run_recipe(self.output / RECIPE, memory=self.memory, **reporting)
        write_page(self.output, self.output / PAGE)
        write_overview(self.output, results["final"])
        return results

    def started(self) -> Recipe | None:
        """Return the existing recipe, which may have been edited; None if there is none.

        One for another request does not count before anything was made by it: its settings may be a mistake.

        Raises:
            EmlocError: the directory holds something else.
        """
        require_own(self.output)
        if not (self.output / RECIPE).is_file():  # nothing is there, or it was killed before it began
            return None
        differing = differences(read_object(self.output / TUNE_REQUEST), self._request())
        if differing:
            if not self._holds_work():
                return None
            fix = (
                f"{_ELSEWHERE} To change a setting, edit {self.output / RECIPE}, delete what was made with the old "
                "one, and run `emloc run` on it."
            )
            raise EmlocError(f"{self.output} was made for something else: {differing}.", fix, code="exists")
        return load_recipe(self.output / RECIPE)

    def _holds_work(self) -> bool:
        """Return whether a stage has finished, or has begun."""
        return any(any(self.output.glob(pattern)) for pattern in (f"*/{MANIFEST}", ".*.partial"))

    def plan(self) -> tuple[Recipe, list[str]]:
        """Return the recipe with what is decided for the memory, and lines that explain it; nothing is written.

        Raises:
            EmlocError: see :meth:`run`; or there is only one row, or no desirable answer.
        """
        skipped: list[Skipped] = []
        held_out_share(self.evaluation, self.data)
        rows = self._rows(skipped)  # bad rows are reported at once, too
        if len({row.key for row in rows}) == 1:
            raise EmlocError(
                "There is only one distinct row, and one is held out to be answered before and after tuning.",
                "Give more rows, or use `emloc train`.",
            )
        if not _desirable(rows):
            raise EmlocError("No row has a wanted answer: every `label` is false.", "Add rows whose label is true.")
        lines = skipped_warnings(skipped)
        emulator = {"compress": CompressSettings(paper=True)} if self.paper else {}
        content = {
            "output": str(self.output.absolute()),
            "model": ModelSection(base=_absolute(self.model), memory=self.memory, headroom=self.headroom),
            "data": DataSection(
                train=self._sources(),
                split=self.split,
                columns=self.columns,
                skip_bad_rows=self.skip_bad_rows,
                eval=self._evaluated(),
                eval_split=self.evaluation.split,
                eval_base=self.evaluation.on_base,
            ),
            **emulator,
            "train": self.settings,
            "merge": self.merge,
            "answers": AnswersSection(rows=HELD_OUT),
        }
        recipe = validated(Recipe, content, "See `emloc tune --help`.")
        require_tuning(recipe)
        return decided(recipe, lines.append, adds_polish=True), lines

    def hold_out(self, directory: Path) -> str:
        """Write the rows that are answered before and after, and never tuned on; return their file."""
        rows = _desirable(self._rows([]))
        few = min(_ANSWERED, max(1, len({row.key for row in rows}) // 4))
        write_rows(directory / HELD_OUT, draw(rows, self.settings.seed, 0, few).selection)
        return str(directory / HELD_OUT)

    def _rows(self, skipped: list[Skipped]) -> list[Row]:
        """Return the rows; rows that are skipped, if any may be, are added to the list."""
        return load_rows(self.data, self.split, columns=self.columns, skipped=skipped if self.skip_bad_rows else None)

    def _write(self, recipe: Recipe, lines: Iterable[str]) -> None:
        """Write the request, the held-out rows, and finally the recipe, with paths relative to it."""
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / RECIPE).unlink(missing_ok=True)  # one for another request, which is replaced next
        write_json(self.output / TUNE_REQUEST, self._request())
        self.hold_out(self.output)
        content = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        rows_of = recipe.data.model_dump(mode="json", exclude_defaults=True)
        content |= {"output": ".", "data": {**rows_of, "test": [HELD_OUT]}}
        content = {name: value for name, value in content.items() if value != {}}
        comments = "".join(f"# {line}\n" for line in lines)
        head = f"# Written by `emloc tune`. Edit it, and run `emloc run` on it.\n{comments}\n"
        write_text(self.output / RECIPE, head + tomli_w.dumps(content))

    def _sources(self) -> Any:
        """Return the sources of the rows as a recipe names them."""
        if (several := weights(self.data)) is not None:
            return {_absolute(name): weight for name, weight in several.items()}
        return _absolute(self.data)

    def _evaluated(self) -> str | None:
        return self.evaluation.data and _absolute(self.evaluation.data)

    def _request(self) -> dict[str, Any]:
        """Return the request as JSON values."""
        content = self.model_dump(mode="json", exclude={"model", "data", "output", "settings"})
        content["evaluation"]["data"] = self._evaluated()
        settings = self.settings.model_dump(mode="json", exclude_unset=True)
        return {"model": _absolute(self.model), "data": self._sources(), **content, "settings": settings}


def _desirable(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with desirable answers."""
    return [row for row in rows if row.label is not False]


def require_own(output: Path) -> None:
    """Refuse an existing output that ``emloc tune`` did not write."""
    if not output.exists() or (output / TUNE_REQUEST).is_file():
        return
    # Hidden files, such as unfinished ones, are ignored.
    if not output.is_dir() or {path.name for path in output.glob("[!.]*")} - _OF_ROWS:
        raise EmlocError(f"{output} exists and was not written by `emloc tune`.", _ELSEWHERE, code="exists")


def by_name(
    data: Rows,
    output: Path,
    split: str = "train",
    columns: Mapping[str, str] = NO_RENAMING,
    *,
    skip_bad_rows: bool = False,
    name: str = ROWS,
) -> Any:
    """Return the names of the rows' files or datasets; rows in memory are first written to a file of the output.

    Raises:
        EmlocError: the rows cannot be read, or the output holds other rows or something else.
    """
    if isinstance(data, str | PathLike):
        return fspath(data)
    if weights(data) is not None:
        return data
    require_own(output)
    skipped: list[Skipped] = []
    rows = load_rows(data, split, columns=columns, skipped=skipped if skip_bad_rows else None)
    file = output / name
    if file.is_file():
        if digest(load_rows(file)) != digest(rows):
            raise EmlocError(f"{file} holds other rows.", _ELSEWHERE, code="exists")
        return str(file)
    output.mkdir(parents=True, exist_ok=True)
    if skipped:
        write_skipped(output / SKIPPED, skipped)
    write_rows(file, rows)
    return str(file)


def _absolute(name: str) -> str:
    """Return an existing path as an absolute one, and anything else unchanged."""
    path = Path(name)
    return str(path.parent.resolve() / path.name) if path.exists() else name


def write_overview(run: Path, final: str) -> None:
    """Write the card of the final output as the card of the whole directory.

    Args:
        final: name of the final output's directory in ``run``, which has a card.
    """
    text = (run / final / CARD).read_text(encoding="utf-8").replace("DIRECTORY", final)
    listed = {
        final: "the result",
        **{name: description for name, description in _HERE.items() if (run / name).is_file()},
    }
    lines = "".join(f"- `{name}`: {description}\n" for name, description in listed.items())
    (run / CARD).write_text(f"{text}\n## In this directory\n\n{lines}", encoding="utf-8")
