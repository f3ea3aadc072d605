"""A job: one model and everything that is done to it. A recipe with a name and a fingerprint."""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, Self

from pydantic import Field, model_validator

from emloc_core.errors import EmlocError
from emloc_core.recipe.recipe import DataSection, EvalSection, ModelSection, Recipe
from emloc_core.recipe.stages import Stage, stages
from emloc_core.requests import ImportRequest
from emloc_core.settings import SAMPLES, CompressSettings, CorrectSettings, PolishSettings, Settings, TrainSettings

#: Increased when a new version of the toolkit gives other bytes for the same inputs: then all jobs are done again.
BYTES = 1
_NATIVE = "native"  # the output with the model that was rewritten
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


class ZooJob(Settings):
    """What is done to one model; frozen, and JSON both ways (``model_dump_json``, ``model_validate_json``).

    Where there is a ``layout``, the model is rewritten before anything else. Without ``train`` the job ends with the
    emulator; otherwise training, correction and, where they are given, ``merge`` and ``eval`` follow.
    """

    name: str = Field(pattern=f"^{NAME}$", description="Name of the job and of its directory in the zoo.")
    model: str = Field(description="Absolute path of a directory, or a hub id, with @revision where that is known.")
    layout: str | None = Field(None, description="Layout of the model, where it has to be rewritten first.")
    data: str | None = Field(None, description="Absolute path of a file of rows, or a hub dataset.")
    split: str = Field("train", description="Split of a hub dataset.")
    test: list[str] = Field([], description="Files of rows that are never tuned on.")
    compress: CompressSettings = CompressSettings()
    train: TrainSettings | None = None
    correct: CorrectSettings = CorrectSettings()
    polish: PolishSettings | None = None
    merge: bool = False
    eval: EvalSection | None = None
    threads: int = Field(1, ge=1, description="Threads of the worker; pinned, since the last bits depend on them.")
    offline: bool = Field(False, description="Never fetch anything from the hub.")

    @model_validator(mode="after")
    def _is_a_recipe(self) -> Self:
        self.recipe(Path())
        return self

    def recipe(self, directory: Path) -> Recipe:
        """Return the job as a recipe whose outputs are in ``directory``."""
        return Recipe(
            output=str(directory),
            model=ModelSection(base=str(directory / _NATIVE) if self.layout else self.model),
            data=DataSection(train=self.data or "", split=self.split, test=self.test),
            compress=self.compress,
            # A job that ends with the emulator corrects nothing, so that it may hold out no selection rows.
            correct=self.correct if self.train else CorrectSettings(clamp="none"),
            **{"train": self.train} if self.train else {},
            polish=self.polish if self.train else None,
            merge=self.merge,
            eval=self.eval,
        )

    def stages(self, directory: Path) -> list[Stage]:
        """Return the commands that do the job, in order, with their outputs in ``directory``."""
        ordered = stages(self.recipe(directory))[: None if self.train else 1]
        if not self.layout:
            return ordered
        native = directory / _NATIVE
        purpose = "rewrite the model in the layout of transformers' own classes"
        return [Stage(purpose, ImportRequest(source=self.model, output=native)), *ordered]

    def fingerprint(self, cache_dir: Path) -> str:
        """Return the SHA-256 over all that decides the outputs: contents of model, data and tasks, settings, threads.

        Hashes of large files are kept in ``cache_dir``. What is on the hub counts by its id and revision, and what
        cannot be read counts by its path: the worker will say what is wrong with it. Imports torch if there is a model.
        """
        content = self.model_dump(exclude={"name", "offline"} if self.layout else {"name", "offline", "layout"})
        content["bytes"] = BYTES
        if Path(self.model).is_dir():
            content["model"] = _model_fingerprint(self.model, cache_dir)
        if self.data:
            content["data"] = _rows_fingerprint(self.data, self.split, cache_dir)
        content["test"] = [_rows_fingerprint(path, self.split, cache_dir) for path in self.test]
        if self.eval:
            content["eval"]["tasks"] = [_task_fingerprint(task, cache_dir) for task in self.eval.tasks]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Return sizes and times of the files of model, rows and tasks, to notice changes without reading them."""
        tasks = self.eval.tasks if self.eval else []
        paths = [Path(name) for name in (self.model, self.data, *self.test, *tasks) if name]
        stamps = {}
        for path in filter(Path.is_absolute, paths):  # an id of the hub is no path here
            for file in (path, *path.glob("[!.]*")):
                with suppress(OSError):
                    status = file.stat()
                    if S_ISREG(status.st_mode) and _decides(file):
                        stamps[str(file)] = (status.st_size, status.st_mtime_ns)
        return stamps

    def smaller(self, stage: str) -> "ZooJob | None":
        """Return the job with less memory for ``stage`` (an output's name), or None if it cannot be made smaller.

        ``emulator``: half of the calibration rows, or of the fewest that a kind takes by default. ``adapter`` and
        ``polished``: half of the batch, and twice as many batches per step. ``evaluation``: half of the batch.
        Correcting and merging cannot be made smaller.
        """
        samples = self.compress.samples or SAMPLES
        if stage == "emulator" and samples > 1:
            compress = self.compress.model_copy(update={"samples": samples // 2})
            return self.model_copy(update={"compress": compress})
        for name, settings in (("train", self.train), ("polish", self.polish)):
            if stage == {"train": "adapter", "polish": "polished"}[name] and settings and settings.batch_size > 1:
                halved = {"batch_size": settings.batch_size // 2, "accumulation": settings.accumulation * 2}
                return self.model_copy(update={name: settings.model_copy(update=halved)})
        if stage == "evaluation" and self.eval and self.eval.batch_size > 1:
            evaluation = self.eval.model_copy(update={"batch_size": self.eval.batch_size // 2})
            return self.model_copy(update={"eval": evaluation})
        return None

    def moved_to(self, other: "ZooJob") -> "ZooJob":
        """Return this job, which may have been made smaller, with the files of another one of the same fingerprint."""
        changes = {name: getattr(other, name) for name in ("model", "layout", "data", "test", "offline")}
        if self.eval and other.eval:
            changes["eval"] = self.eval.model_copy(update={"tasks": other.eval.tasks})
        return self.model_copy(update=changes)


def _decides(file: Path) -> bool:
    """Say whether a file of a model may affect the outputs: texts about it do not."""
    return file.suffix != ".md" and "LICENSE" not in file.name


def _model_fingerprint(model: str, cache_dir: Path) -> str:
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.files.inputs import Inputs

    try:
        checkpoint = Checkpoint(model)
        # The tokenizer decides what the rows become.
        side = list(filter(_decides, checkpoint.side_files()))
        inputs = Inputs(cache_dir)
        return f"{checkpoint.fingerprint(inputs)} {inputs.hash(side)}"
    except (EmlocError, OSError) as error:
        return f"{model}: {error}"


def _rows_fingerprint(source: str, split: str, cache_dir: Path) -> str:
    """Return a hash of the content of rows and their pictures, wherever they are; for a hub dataset, its id."""
    from emloc_core.data.rows import digest, load_rows
    from emloc_core.files.inputs import Inputs

    path = Path(source)
    if not path.exists():
        return source
    try:
        return digest(load_rows(source, split))
    except EmlocError:  # the worker will say what is wrong with them
        return Inputs(cache_dir).hash([path]) if path.is_file() else source


def _task_fingerprint(task: str, cache_dir: Path) -> str:
    """Return a hash of a task's file, its functions and its data; for a bundled task, its name."""
    if not Path(task).is_file():
        return task
    from emloc_core.evaluation.tasks import find_task
    from emloc_core.files.inputs import Inputs

    try:
        return find_task(task, Inputs(cache_dir)).digest
    except (EmlocError, OSError) as error:
        return f"{task}: {error}"


def slug(text: str) -> str:
    """Return a name for a directory: the last part of a path or id, with other characters replaced."""
    last = "".join([part for part in re.split(r"[/\\]", text) if part.strip(".")][-1:])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last.partition("@")[0]).lstrip("._-")[:90] or "model"


def unique(jobs: Sequence[ZooJob]) -> list[ZooJob]:
    """Return the jobs with unique names: where models share a name, it gets a hash of the model, whatever their order.

    The second job of a name and a model gets ``-2``, and so on, in order.
    """
    models: dict[str, set[str]] = {}  # some file systems do not tell cases apart
    for job in jobs:
        models.setdefault(job.name.lower(), set()).add(job.model)
    names: set[str] = set()
    renamed = []
    for job in jobs:
        name, number = job.name, 1
        if len(models[name.lower()]) > 1:
            name += f"-{hashlib.sha256(job.model.encode()).hexdigest()[:6]}"
        first = name
        while name.lower() in names:
            number += 1
            name = f"{first}-{number}"
        names.add(name.lower())
        renamed.append(job.model_copy(update={"name": name}))
    return renamed


def describe_change(before: ZooJob, after: ZooJob) -> str:
    """Say how a job was made smaller: ``train.batch_size 8 -> 4``."""
    old, new = _flat(before.model_dump()), _flat(after.model_dump())
    changed = [key for key in old if old[key] != new.get(key)]
    return ", ".join(f"{key} {'default' if old[key] is None else old[key]} -> {new[key]}" for key in changed)


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
