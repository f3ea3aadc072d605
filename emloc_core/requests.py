"""What a stage is asked for: one request per stage, from Python, the command line, recipes and the zoo alike.

A request is JSON both ways (:meth:`Request.to_json`, :func:`request_from_json`), so that a stage can run in a process
of its own. Imports nothing heavy.
"""

import json
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from emloc_core.errors import EmlocError
from emloc_core.settings import (
    CompressSettings,
    CorrectSettings,
    CutSettings,
    ExactSettings,
    PolishSettings,
    Settings,
    TrainSettings,
    explain,
)

#: A file or hub data set by name, or rows in memory: an iterable of mappings, such as a ``datasets.Dataset``.
Rows = Any


class Request(Settings):
    """One run of a stage. Paths may be relative to the working directory; ``settings`` say how the work is done."""

    stage: ClassVar[str]
    output: Path = Field(description="The directory that the stage makes.")

    @model_validator(mode="before")
    @classmethod
    def _plain_paths(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Take anything that stands for a path, such as the result of another stage."""
        return {name: fspath(value) if isinstance(value, PathLike) else value for name, value in values.items()}

    def to_json(self) -> str:
        """Return the request as JSON. Rows in memory have to be JSON values."""
        return json.dumps({"stage": self.stage, **self.model_dump(mode="json", exclude_unset=True)})


class ImportRequest(Request):
    """Rewrite a checkpoint of another layout as a native one."""

    stage = "import"
    source: str = Field(description="Directory or hub id.")


class CompressRequest(Request):
    """Make an emulator."""

    stage = "compress"
    model: str = Field(description="The base: directory or hub id.")
    data: Rows = Field(description="Rows of the user's task.")
    exclude: tuple[Path, ...] = Field((), description="Files of rows that are neither calibration nor selection.")
    split: str = Field("train", description="Split of a hub data set.")
    memory: str | None = Field(None, description="Take the largest ratio whose tuning fits; 24GiB, say.")
    tuning: TrainSettings = Field(TrainSettings(), description="With `memory`: how the emulator will be tuned.")
    keep_spectra: Path | None = Field(None, description="Directory in which spectra are kept, for `cut`.")
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto.")
    settings: CompressSettings = CompressSettings()

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.memory is not None and "ratio" in self.settings.model_fields_set:
            raise ValueError("ratio and memory both say how large the emulator is; give one of them")
        return self


class CutRequest(Request):
    """Cut an emulator of any ratio from spectra."""

    stage = "cut"
    spectra: Path
    base: str | None = Field(None, description="Directory or hub id; None: the model that the spectra name.")
    settings: CutSettings = CutSettings()


class TrainRequest(Request):
    """Train a LoRA on an emulator, or on an ordinary model."""

    stage = "train"
    model: str = Field(description="Directory or hub id.")
    data: Rows = Field(description="Rows of the user's task.")
    exclude: tuple[Path, ...] = Field((), description="Files of rows that are not trained on.")
    split: str = Field("train", description="Split of a hub data set.")
    exact: bool = Field(False, description="Read an ordinary model block by block: it need not fit in memory.")
    limits: ExactSettings = Field(ExactSettings(), description="With `exact`: what the steps may use.")
    settings: TrainSettings = TrainSettings()


class CorrectRequest(Request):
    """Correct a LoRA that was trained on an emulator, for the base."""

    stage = "correct"
    adapter: Path
    base: str | None = Field(None, description="Directory or hub id; None: the model that the emulator names.")
    emulator: Path | None = Field(None, description="Where the emulator is, if it was moved.")
    selection: Path | None = Field(None, description="Other rows to choose the clamp on.")
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto.")
    settings: CorrectSettings = CorrectSettings()


class PolishRequest(Request):
    """Take exact steps on the base from an adapter."""

    stage = "polish"
    adapter: Path = Field(description="A LoRA for the base: corrected, trained on the base or on its emulator, or made by PEFT.")
    base: str | None = Field(None, description="Directory or hub id; None: the model that the adapter is for.")
    data: Rows = Field(description="Rows of the user's task.")
    exclude: tuple[Path, ...] = Field((), description="Files of rows that are not trained on.")
    split: str = Field("train", description="Split of a hub data set.")
    limits: ExactSettings = Field(ExactSettings(), description="What the steps may use.")
    settings: PolishSettings = PolishSettings()


class MergeRequest(Request):
    """Merge an adapter into its base."""

    stage = "merge"
    adapter: Path
    base: str | None = Field(None, description="Directory or hub id; None: the model that the adapter names.")
    allow_uncorrected: bool = Field(False, description="Merge an adapter as it was trained on an emulator.")


class System(Settings):
    """What is evaluated: a model (base, emulator, merged), alone or with a PEFT adapter on it."""

    name: str
    model: str = Field(description="Directory or hub id.")
    adapter: Path | None = Field(None, description="Directory of a PEFT adapter.")


class EvaluateRequest(Request):
    """Compare systems on tasks."""

    stage = "eval"
    systems: tuple[System, ...]
    tasks: tuple[str, ...] = Field(description="Task files of lm-eval, or names of its bundled tasks.")
    limit: int | None = Field(None, ge=1, description="Take the first so many rows of every task.")
    batch_size: int = Field(8, ge=1, description="Rows per batch.")
    chat: bool | None = Field(None, description="Use the chat template; None: where a task's rows are conversations.")
    seed: int = Field(0, ge=0, description="Seed of Python, NumPy, torch and the choice of few-shot examples.")


REQUESTS: dict[str, type[Request]] = {
    request.stage: request
    for request in (
        ImportRequest,
        CompressRequest,
        CutRequest,
        TrainRequest,
        CorrectRequest,
        PolishRequest,
        MergeRequest,
        EvaluateRequest,
    )
}


def request_from_json(text: str) -> Request:
    """Return the request that :meth:`Request.to_json` wrote."""
    content = json.loads(text)
    return REQUESTS[content.pop("stage")](**content)


def make_request(stage: str, settings: Mapping[str, Any] | None = None, **content: Any) -> Any:
    """Return the request of a stage.

    Args:
        stage: its name.
        settings: by name; those that are left out have their defaults.
        content: the other fields.

    Raises:
        EmlocError: a name or a value is wrong; names all of them.
    """
    kind = REQUESTS[stage]
    if settings is not None:
        kind_of_settings: Any = kind.model_fields["settings"].annotation
        content["settings"] = _validated(kind_of_settings, settings, stage)
    return _validated(kind, content, stage)


def _validated(kind: type[BaseModel], values: Mapping[str, Any], stage: str) -> Any:
    try:
        return kind(**values)
    except ValidationError as error:
        raise EmlocError(explain(error, kind), f"See `emloc {stage} --help`.") from None
