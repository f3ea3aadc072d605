"""One request per stage, used by the Python API, the command line, recipes and the zoo alike.

Requests convert to JSON and back (:meth:`Request.to_json`, :func:`request_from_json`), so that a stage can run in its
own process. Imports nothing heavy.
"""

import json
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from emloc_core.errors import validated
from emloc_core.settings import (
    FREE,
    Columns,
    CompressSettings,
    CorrectSettings,
    ExactSettings,
    ExportSettings,
    PolishSettings,
    Settings,
    SplitOrShare,
    TrainSettings,
)
from emloc_core.units import parse_bytes

#: A file, saved or hub dataset by name; several by a list or with weights; or rows in memory: an iterable of mappings,
#: such as a ``datasets.Dataset``.
Rows = Any


COLUMNS = "Your names for the usual columns, such as prompt=question,completion=answer."

SKIP = "Skip rows that cannot be read instead of stopping; skipped_rows.jsonl in the output lists them, with reasons."


class Request(Settings):
    """One run of a stage. Paths may be relative to the working directory."""

    stage: ClassVar[str]
    output: Path = Field(description="Output directory.")

    @model_validator(mode="before")
    @classmethod
    def _plain_paths(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Accept anything path-like, such as the result of another stage."""
        return {name: fspath(value) if isinstance(value, PathLike) else value for name, value in values.items()}

    def to_json(self) -> str:
        """Return the request as JSON. Rows in memory must be JSON values."""
        return json.dumps({"stage": self.stage, **self.model_dump(mode="json", exclude_unset=True)})


class ImportRequest(Request):
    """Convert a checkpoint with another layout to the native one."""

    stage = "import"
    source: str = Field(description="Directory or hub id.")


class RowsRequest(Request):
    """Do something with rows."""

    data: Rows = Field(description="Rows of the task.")
    exclude: tuple[Path, ...] = Field(
        (), description="Files, or datasets with the same split, whose rows are left out, such as test rows."
    )
    split: str = Field("train", description="Split of a saved or hub dataset.")
    columns: Columns = Field({}, description=COLUMNS)
    skip_bad_rows: bool = Field(False, description=SKIP)


class CompressRequest(RowsRequest):
    """Make an emulator."""

    stage = "compress"
    model: str = Field(description="Base model: directory or hub id.")
    memory: str | None = Field(
        None, description="Memory to tune in, such as 24GiB: chooses the best kind and the largest ratio that fit."
    )
    headroom: str | None = Field(None, description="How much of `memory` to keep free, such as 2GiB, 8% or 0.")
    tuned_on: str = Field("auto", description="The device that `memory` applies to: cpu, cuda, xpu, or auto.")
    tuning: TrainSettings = Field(TrainSettings(), description="With `memory`: how the emulator will be tuned.")
    device: str = Field("auto", description="cpu, cuda, cuda:1, xpu, or auto.")
    adapter: Path | None = Field(
        None, description="LoRA of the model: the emulator is fitted with it, to train it further there."
    )
    settings: CompressSettings = CompressSettings()

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.memory is not None and "ratio" in self.settings.model_fields_set:
            raise ValueError("ratio and memory both set the emulator's size; give one of them")
        if self.memory not in (None, FREE):
            parse_bytes(self.memory)  # reports a missing unit at once
        if self.memory is None and self.headroom is not None:
            raise ValueError("headroom has no effect without memory; give both, or leave it out")
        _require_use(self.tuning, "memory", used=self.memory is not None)
        return self


class EvalRows(Settings):
    """Rows to evaluate while tuning; by default none."""

    data: Rows = Field(
        None, description="Rows to evaluate; by default another split, or a held-out share, of the data."
    )
    split: SplitOrShare | None = Field(
        None, description="Split of these rows, or the share of the data to hold out, such as 0.05."
    )
    on_base: bool = Field(
        False, description="Also evaluate the base with the LoRA, streamed, and keep the checkpoint that is best there."
    )
    base: str | None = Field(None, description="Directory or hub id; by default the model that the emulator names.")

    @model_validator(mode="after")
    def _base_is_evaluated(self) -> Self:
        if self.base is not None and not self.on_base:
            raise ValueError(
                "base has no effect unless the base is evaluated; add on_base (--eval-base), or leave it out"
            )
        return self


class TrainRequest(RowsRequest):
    """Train a LoRA on an emulator, or on an ordinary model."""

    stage = "train"
    model: str = Field(description="Emulator or ordinary model: directory or hub id.")
    exact: bool = Field(False, description="Read the model block by block, so that it need not fit in memory.")
    limits: ExactSettings = Field(ExactSettings(), description="With `exact`: what the steps may use.")
    evaluation: EvalRows = Field(EvalRows(), description="Rows to evaluate while tuning.")
    settings: TrainSettings = TrainSettings()

    @model_validator(mode="after")
    def _limits_are_used(self) -> Self:
        _require_use(self.limits, "exact", used=self.exact)
        return self


class CorrectRequest(Request):
    """Correct a LoRA that was trained on an emulator, for use on the base."""

    stage = "correct"
    adapter: Path = Field(description="Directory of the LoRA.")
    base: str | None = Field(None, description="Directory or hub id; by default the model that the emulator names.")
    emulator: Path | None = Field(None, description="Directory of the emulator, if it has moved.")
    selection_data: Path | None = Field(None, description="Other rows to choose the clamp on.")
    device: str = Field("auto", description="cpu, cuda, cuda:1, xpu, or auto.")
    settings: CorrectSettings = CorrectSettings()

    @model_validator(mode="after")
    def _has_a_choice(self) -> Self:
        if self.selection_data and self.settings.clamp != "auto":
            raise ValueError("selection_data has no effect with a fixed clamp; leave one of them out")
        return self


class PolishRequest(RowsRequest):
    """Train an adapter for a few exact steps on the base."""

    stage = "polish"
    adapter: Path = Field(description="Adapter to start from: corrected, or trained on the base or its emulator.")
    base: str | None = Field(None, description="Directory or hub id; by default the model that the adapter is for.")
    limits: ExactSettings = Field(ExactSettings(), description="What the steps may use.")
    evaluation: EvalRows = Field(EvalRows(), description="Rows to evaluate while tuning.")
    settings: PolishSettings = PolishSettings()


class MergeRequest(Request):
    """Merge an adapter into its base."""

    stage = "merge"
    adapter: Path = Field(description="Directory of the adapter.")
    base: str | None = Field(None, description="Directory or hub id; by default the model that the adapter names.")
    allow_uncorrected: bool = Field(
        False, description="Merge an adapter that was trained on an emulator without correcting it."
    )


class ExportRequest(Request):
    """Write an adapter or a checkpoint in the form that servers expect."""

    stage = "export"
    source: str = Field(description="Directory of an adapter, or directory or hub id of a model.")
    base: str | None = Field(None, description="Model that the adapter is for; by default the one that it names.")
    allow_uncorrected: bool = Field(
        False, description="Export an adapter that was trained on an emulator without correcting it."
    )
    settings: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _has_matrices(self) -> Self:
        if "dtype" in self.settings.model_fields_set and not self.settings.gguf:
            raise ValueError("dtype has no effect without gguf; give both, or leave it out")
        return self


class System(Settings):
    """One system to evaluate: a model (base, emulator, merged), alone or with a PEFT adapter."""

    name: str
    model: str = Field(description="Directory or hub id.")
    adapter: Path | None = Field(None, description="Directory of a PEFT adapter.")


class EvaluateRequest(Request):
    """Compare systems on tasks."""

    stage = "eval"
    systems: tuple[System, ...]
    tasks: tuple[str, ...] = Field(description="Task files of lm-eval, or names of its bundled tasks.")
    limit: int | None = Field(None, ge=1, description="Use only this many rows of each task.")
    batch_size: int = Field(8, ge=1, description="Rows per batch. Halved where memory runs out.")
    chat: bool | None = Field(
        None, description="Use the chat template; by default, only if a task's rows are conversations."
    )
    seed: int = Field(0, ge=0, description="Seed for Python, NumPy, torch and the choice of few-shot examples.")


REQUESTS: dict[str, type[Request]] = {
    request.stage: request
    for request in (
        ImportRequest,
        CompressRequest,
        TrainRequest,
        CorrectRequest,
        PolishRequest,
        MergeRequest,
        ExportRequest,
        EvaluateRequest,
    )
}


def request_from_json(text: str) -> Request:
    """Return the request that :meth:`Request.to_json` wrote."""
    content = json.loads(text)
    return REQUESTS[content.pop("stage")](**content)


def make_request(stage: str, settings: Mapping[str, Any] | None = None, **content: Any) -> Any:
    """Return the request of a stage.

    Raises:
        EmlocError: names or values are wrong; the message lists them all.
    """
    kind, remedy = REQUESTS[stage], f"See `emloc {stage} --help`."
    if settings is not None:
        kind_of_settings: Any = kind.model_fields["settings"].annotation
        content["settings"] = validated(kind_of_settings, settings, remedy)
    return validated(kind, content, remedy)


def _require_use(settings: Settings, owner: str, *, used: bool) -> None:
    """Refuse settings that are given without the option that they belong to."""
    names = sorted(settings.model_fields_set)
    if names and not used:
        have, them = ("has", "it") if len(names) == 1 else ("have", "them")
        raise ValueError(f"{' and '.join(names)} {have} no effect without {owner}; give both, or leave {them} out")
