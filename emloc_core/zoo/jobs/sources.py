"""Turns what a user names (entries of the registry, directories of models, files of jobs) into jobs.

A path in a file of jobs stays in the file's directory.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from emloc_core.errors import EmlocError, explain
from emloc_core.files.documents import read_toml
from emloc_core.recipe.recipe import DATA_ID, FILES, MODEL_ID, TASK_NAME, EvalSection
from emloc_core.registry.registry import Entry, find, load_entries
from emloc_core.registry.registry import resolve as resolve_preset
from emloc_core.settings import CompressSettings, CorrectSettings, PolishSettings, Settings, TrainSettings
from emloc_core.zoo.jobs.job import NAME, ZooJob, slug, unique

_SOURCES = (
    "Give a model directory, a directory of those, ids of the registry (`emloc zoo list`), or a file of jobs, which "
    "may name other models of the hub."
)


class JobSection(Settings):
    """One ``[[job]]`` of a file of jobs. Paths are relative to the file."""

    name: str | None = Field(None, pattern=f"^{NAME}$", description="Name of the job; by default the model's.")
    model: str = Field(description="Directory, or hub id with an optional @revision.")
    data: str | None = Field(None, description="Rows: a file, or a hub dataset.")
    split: str = Field("train", description="Split of a hub dataset.")
    test: list[str] = Field([], description="Files of rows that are never tuned on.")
    ratio: float | None = Field(None, gt=0, lt=1, description="Shorthand for compress.ratio.")
    compress: dict[str, Any] = Field({}, description="Settings of stage 1.")
    train: TrainSettings | bool = Field(True, description="Settings of stage 2; false ends with the emulator.")
    correct: CorrectSettings = CorrectSettings()
    polish: PolishSettings | None = Field(None, description="Exact steps on the base, after the correction.")
    merge: bool = Field(False, description="Write the merged checkpoint.")
    eval: EvalSection | None = Field(None, description="Evaluation; without it, nothing is compared.")
    threads: int | None = Field(None, ge=1, description="Threads of the worker.")

    @model_validator(mode="after")
    def _compresses(self) -> "JobSection":
        if self.ratio is not None and "ratio" in self.compress:
            raise ValueError("give ratio or compress.ratio, not both")
        return self

    @model_validator(mode="after")
    def _trains_what_it_can(self) -> "JobSection":
        requested = [name for name in ("train", "correct", "polish", "merge", "eval") if name in self.model_fields_set]
        requested = [name for name in requested if getattr(self, name)]
        if requested and (self.data is None or self.train is False):
            raise ValueError(
                f"{', '.join(requested)}: only a job with its own data, and without train = false, is trained"
            )
        return self


class JobsFile(Settings):
    """A file of jobs."""

    job: list[JobSection] = Field(min_length=1)


@dataclass(frozen=True)
class Defaults:
    """What the command line says for all jobs.

    Attributes:
        data: rows to calibrate on, for jobs without their own.
        compress: settings of stage 1; they override an entry's preset, and a file of jobs overrides them.
        preset: name of the entries' preset; ``default`` if none is given.
        registry: files and directories of more entries.
    """

    data: str | None = None
    split: str = "train"
    compress: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    threads: int = 1
    offline: bool = False
    registry: Sequence[Path] = ()

    @property
    def common(self) -> dict[str, Any]:
        """What jobs without rows of their own have in common."""
        return {name: getattr(self, name) for name in ("data", "split", "threads", "offline")}


def resolve(sources: Iterable[str], defaults: Defaults) -> list[ZooJob]:
    """Return the jobs of all sources, in order, with unique names.

    A job with its own rows is compressed, trained and corrected, and compared if it names tasks; one with the command
    line's rows ends with the emulator.

    Raises:
        EmlocError: a source is none of these, with what was probably meant; a file is wrong; the rows of the command
            line are missing; or the kind of emulator cannot be chosen without a memory.
    """
    defaults = replace(defaults, data=_rows(defaults.data))
    jobs: list[ZooJob] = []
    for source in sources:
        path = Path(expanduser(source))  # which leaves an unknown ~name as it is
        if path.is_dir():
            jobs += [_plain(model, defaults) for model in _models(path)]
        elif path.suffix == ".toml":
            jobs += _read_jobs(path, defaults)
        elif path.exists() or source.startswith((".", "/", "~")) or source.endswith("/"):
            problem = "is neither a directory of models nor a TOML file of jobs" if path.exists() else "does not exist"
            raise EmlocError(f"{source} {problem}.", _SOURCES)
        else:
            known = load_entries(defaults.registry)
            try:
                named = find(source, known)
            except EmlocError as error:
                message = f"There is no directory {source}. {error.args[0]}"
                raise EmlocError(message, _SOURCES, code=error.code) from None
            jobs += [_from_entry(entry, defaults) for entry in named]
    return unique(jobs)


def _models(directory: Path) -> list[Path]:
    """Return the model directories: this one, or those in it, including damaged ones."""
    if _is_model(directory):
        return [directory]
    models = [path for path in sorted(directory.iterdir()) if path.is_dir() and _is_model(path)]
    if not models:
        raise EmlocError(
            f"{directory} holds no model: no config.json and no safetensors, in it or one level below.",
            "Give a directory of Hugging Face model directories.",
        )
    return models


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() or any(directory.glob("*.safetensors"))


def _plain(model: Path, defaults: Defaults) -> ZooJob:
    path, settings = str(model.absolute()), CompressSettings(**defaults.compress)
    return ZooJob(name=slug(path), model=path, compress=settings, **defaults.common)


def _rows(data: str | None) -> str | None:
    """Return the command line's rows: a file by its absolute path."""
    if not data:
        return None
    path = Path(data)
    if path.exists():
        return str(path.absolute())
    if path.suffix in FILES or data.startswith((".", "~")) or not DATA_ID.fullmatch(data):
        raise EmlocError(f"There are no rows at {data}.", "Give a file, or a hub dataset (organisation/name).")
    return data


def _from_entry(entry: Entry, defaults: Defaults) -> ZooJob:
    model = entry.model if entry.checkpoint or not entry.revision else f"{entry.id}@{entry.revision}"
    settings = resolve_preset(entry, defaults.preset or "default", overrides=defaults.compress)
    return ZooJob(name=slug(entry.id), model=model, layout=entry.layout, compress=settings, **defaults.common)


def _read_jobs(path: Path, defaults: Defaults) -> Iterator[ZooJob]:
    layouts = {entry.id: entry.layout for entry in load_entries(defaults.registry)}
    try:
        for section in JobsFile(**read_toml(path, "file of jobs")).job:
            layout = layouts.get(section.model.partition("@")[0])
            yield _from_section(section, path, defaults).model_copy(update={"layout": layout})
    except ValidationError as error:
        model = next((kind for kind in (JobsFile, CompressSettings) if kind.__name__ == error.title), ZooJob)
        raise EmlocError(f"{path}: {explain(error, model)}", "Fix these settings.") from None


def _from_section(section: JobSection, file: Path, defaults: Defaults) -> ZooJob:
    model = _inside(file, section.model, MODEL_ID)
    own = None if section.data is None else _inside(file, section.data, DATA_ID)
    ratio = {} if section.ratio is None else {"ratio": section.ratio}
    train = TrainSettings() if section.train is True else section.train or None
    evaluation = section.eval and section.eval.model_copy(
        update={"tasks": [_inside(file, task, TASK_NAME) for task in section.eval.tasks]}
    )
    return ZooJob(
        name=section.name or slug(section.model),
        model=model,
        data=own or defaults.data,
        split=section.split if own else defaults.split,
        test=[_inside(file, test) for test in section.test],
        compress=CompressSettings(**{**defaults.compress, **ratio, **section.compress}),
        train=train if own else None,
        correct=section.correct,
        polish=section.polish,
        merge=section.merge,
        eval=evaluation,
        threads=section.threads or defaults.threads,
        offline=defaults.offline,
    )


def _inside(file: Path, text: str, names: re.Pattern[str] | None = None) -> str:
    """Return the absolute path of what a file names; or the text, if it may be a name and no such file exists."""
    if "\0" in text:
        raise EmlocError(f"{file} names {text!r}, which cannot be a file's name.", "Correct it.")
    root = file.absolute().parent.resolve()
    path = (root / text).resolve()
    if Path(text).is_absolute() or text.startswith("~") or not path.is_relative_to(root):
        raise EmlocError(f"{file} names {text!r}, outside its directory.", "Put it beside the file of jobs.")
    is_path = text.startswith(".") or path.suffix in FILES or path.exists()
    return text if names and names.fullmatch(text) and not is_path else str(path)
