"""The Python API: one function per stage, with the same checks as the command line.

Models are directories or hub ids. Data are files, saved or hub datasets, a list of them or a mapping to their weights,
or rows in memory. Settings are keyword arguments, named as in :mod:`emloc_core.settings` and typed in
:mod:`emloc_core.keywords`. Every stage returns a :class:`~emloc_core.stages.result.Result`, a path-like object. If the
output already exists and was made from the same inputs, the stage returns it; an interrupted stage resumes.

``progress`` is called with a :class:`~emloc_core.stages.progress.ProgressEvent` for every item that is done. With it,
a stage writes nothing to stdout and stderr. It logs to loggers below ``emloc``.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from emloc_core.errors import EmlocError, validated
from emloc_core.keywords import (
    CompressKwargs,
    CorrectKwargs,
    EvalRowsKwargs,
    EvaluateKwargs,
    ExactKwargs,
    ExportKwargs,
    PlanKwargs,
    PolishKwargs,
    RecipeKwargs,
    TrainKwargs,
)
from emloc_core.processes.environment import quiet, settle
from emloc_core.requests import Request, Rows, System, make_request
from emloc_core.settings import AUTO, FREE, TrainSettings
from emloc_core.stages.progress import ProgressEvent, Reporter
from emloc_core.stages.result import (
    AdapterResult,
    CorrectionResult,
    EmulatorResult,
    EvaluationResult,
    ExportResult,
    ImportResult,
    MergeResult,
    Result,
    RunResult,
)

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainerCallback

    from emloc_core.evaluation.conversation import Conversation
    from emloc_core.family import Family
    from emloc_core.memory.plan import MemoryPlan

Name = str | PathLike[str]
ColumnNames = Mapping[str, str]
OnProgress = Callable[[ProgressEvent], Any]

#: Stages whose trainer shows its own progress bar.
_WITH_A_BAR = {"train", "polish"}


def compress(  # noqa: PLR0913 - all by keyword
    model: Name,
    data: Rows,
    output: Name,
    *,
    memory: str | None = None,
    headroom: str | None = None,
    tuned_on: str = "auto",
    tuning: TrainKwargs | None = None,
    exclude: Iterable[Name] = (),
    split: str = "train",
    columns: ColumnNames | None = None,
    skip_bad_rows: bool = False,
    adapter: Name | None = None,
    device: str = "auto",
    progress: OnProgress | None = None,
    **settings: Unpack[CompressKwargs],
) -> Result[EmulatorResult]:
    """Make an emulator of a model: stage 1 (paper, section 3.2).

    Args:
        model: the base model.
        data: rows of the task.
        output: directory of the emulator.
        memory: memory to tune in, such as ``24GiB``; chooses the ``kind`` that is recommended for it, unless one is
            given, and the largest ``ratio`` that fits.
        headroom: how much of it to keep free: a size, a share such as ``8%``, or ``0``; by default 5 %, at most 1 GiB.
        tuned_on: the device that ``memory`` refers to, if another machine will do the tuning.
        tuning: with ``memory``, the settings of :func:`train` that the emulator will be tuned with.
        exclude: files with rows to leave out, such as test rows.
        split: split of a saved or hub dataset.
        columns: your names of columns, by the usual names: ``{"prompt": "question"}``.
        skip_bad_rows: leave out rows that cannot be read, instead of raising.
        adapter: a LoRA of the model, corrected or trained on it. The emulator is fitted with it, and :func:`train` on
            the emulator trains it further.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``xpu``, or ``auto``.
        progress: called after every block.
        settings: see :class:`~emloc_core.settings.CompressSettings`: ``ratio``, ``samples``, ...

    Raises:
        EmlocError: the model, its family, the data or the settings cannot be used.
    """
    sizing: dict[str, Any] = {} if tuning is None else {"tuning": dict(tuning)}
    content = {"model": model, "output": output, **_rows(data, exclude, split, columns, skip_bad_rows=skip_bad_rows)}
    sizing |= {"memory": memory, "headroom": headroom, "tuned_on": tuned_on}
    more = {"adapter": adapter, "device": device, **sizing}
    return _perform(make_request("compress", settings, **content, **more), progress)


def train(  # noqa: PLR0913 - all by keyword
    model: Name,
    data: Rows,
    output: Name,
    *,
    exclude: Iterable[Name] = (),
    split: str = "train",
    columns: ColumnNames | None = None,
    skip_bad_rows: bool = False,
    exact: bool = False,
    limits: ExactKwargs | None = None,
    evaluation: EvalRowsKwargs | None = None,
    peft_config: "LoraConfig | None" = None,
    callbacks: Sequence["TrainerCallback"] = (),
    progress: OnProgress | None = None,
    **settings: Unpack[TrainKwargs],
) -> Result[AdapterResult]:
    """Train a LoRA on an emulator, or on an ordinary model: stage 2.

    Args:
        model: the emulator or model.
        data: rows of the task. Those that an emulator keeps for calibration and selection are left out.
        output: directory of the adapter.
        exclude: files with rows not to train on.
        split: split of a saved or hub dataset.
        columns: your names of columns, by the usual names: ``{"prompt": "question"}``.
        skip_bad_rows: leave out rows that cannot be read, instead of raising.
        exact: read the model, an ordinary one or an emulator, block by block, so that it need not fit in memory; see
            :func:`polish`.
        limits: with ``exact``, see :func:`polish`.
        evaluation: rows to evaluate while training, see :class:`~emloc_core.requests.EvalRows`: ``data``, ``split``,
            ``on_base``, ``base``. The best checkpoint is kept.
        peft_config: the LoRA as a config of PEFT, instead of ``lora_rank`` and its other settings.
        callbacks: callbacks for transformers' trainer. They do not count among the output's inputs.
        progress: called after every optimiser step; by default the trainer shows its progress bar.
        settings: see :class:`~emloc_core.settings.TrainSettings`: ``steps``, ``learning_rate``, ``lora_rank``, ...;
            and, as ``extra``, other fields of TRL's ``SFTConfig`` or ``DPOConfig``: ``{"weight_decay": 0.01}``.

    Raises:
        EmlocError: the model, the data or the settings cannot be used, or the loss is NaN or infinite.
    """
    content = {"model": model, "output": output, **_rows(data, exclude, split, columns, skip_bad_rows=skip_bad_rows)}
    more = {"exact": exact, "limits": dict(limits or {}), "evaluation": dict(evaluation or {})}
    values = settings if peft_config is None else _with_lora(settings, peft_config)
    return _perform(make_request("train", values, **content, **more), progress, callbacks)


def correct(
    adapter: Name,
    output: Name | None = None,
    *,
    base: Name | None = None,
    emulator: Name | None = None,
    selection_data: Name | None = None,
    device: str = "auto",
    progress: OnProgress | None = None,
    **settings: Unpack[CorrectKwargs],
) -> Result[CorrectionResult]:
    """Correct a LoRA that was trained on an emulator, for use on the base: stage 3 (paper, section 3.3).

    Args:
        adapter: output of :func:`train`, or any PEFT LoRA that was trained on an emulator.
        output: directory of the corrected adapter; by default ``ADAPTER-corrected``, beside the adapter.
        base: the model that the emulator was made from; by default the one that the emulator names.
        emulator: directory of the emulator; by default the one that the adapter names.
        selection_data: file with rows to choose the clamp on; by default those that the emulator keeps.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``xpu``, or ``auto``.
        progress: called after every Linear.
        settings: see :class:`~emloc_core.settings.CorrectSettings`: ``clamp``, ``correction``.

    Raises:
        EmlocError: adapter, emulator and base do not belong together, or the adapter is already corrected.
    """
    content = {
        "adapter": adapter,
        "output": output or _beside(adapter, "corrected"),
        "base": base,
        "emulator": emulator,
        "selection_data": selection_data,
        "device": device,
    }
    return _perform(make_request("correct", settings, **content), progress)


def polish(  # noqa: PLR0913 - all by keyword
    adapter: Name,
    data: Rows,
    output: Name | None = None,
    *,
    base: Name | None = None,
    exclude: Iterable[Name] = (),
    split: str = "train",
    columns: ColumnNames | None = None,
    skip_bad_rows: bool = False,
    limits: ExactKwargs | None = None,
    evaluation: EvalRowsKwargs | None = None,
    callbacks: Sequence["TrainerCallback"] = (),
    progress: OnProgress | None = None,
    **settings: Unpack[PolishKwargs],
) -> Result[AdapterResult]:
    """Train an adapter for a few exact steps on the base itself, in the memory of a few blocks.

    Args:
        adapter: output of :func:`correct` or :func:`train`, or any PEFT LoRA of the base.
        data: rows of the task.
        output: directory of the polished adapter; by default ``ADAPTER-polished``, beside the adapter.
        base: the model; by default the one that the adapter is for.
        exclude: files with rows not to train on.
        split: split of a saved or hub dataset.
        columns: your names of columns, by the usual names: ``{"prompt": "question"}``.
        skip_bad_rows: leave out rows that cannot be read, instead of raising.
        limits: see :class:`~emloc_core.settings.ExactSettings`: ``memory``, ``park``.
        evaluation: rows to evaluate while training, see :func:`train`: ``data`` and ``split``.
        callbacks: of transformers' trainer, see :func:`train`.
        progress: called after every optimiser step; by default the trainer shows its progress bar.
        settings: see :class:`~emloc_core.settings.PolishSettings`: ``steps``, ``learning_rate``, ``batch_size``, ...;
            and, as ``extra``, other fields of TRL's ``SFTConfig``.

    Raises:
        EmlocError: the adapter does not belong to the base, the data or settings cannot be used, or the base changed
            during training.
    """
    content = {
        "adapter": adapter,
        "output": output or _beside(adapter, "polished"),
        "base": base,
        **_rows(data, exclude, split, columns, skip_bad_rows=skip_bad_rows),
        "limits": dict(limits or {}),
        "evaluation": dict(evaluation or {}),
    }
    return _perform(make_request("polish", settings, **content), progress, callbacks)


def merge(
    adapter: Name,
    output: Name,
    *,
    base: Name | None = None,
    allow_uncorrected: bool = False,
    progress: OnProgress | None = None,
) -> Result[MergeResult]:
    """Merge an adapter into its base: an ordinary checkpoint of the original architecture.

    Args:
        adapter: output of :func:`correct`, or a LoRA that was trained on the base itself.
        output: directory of the checkpoint.
        base: the model that the adapter belongs to; by default the one that it names.
        allow_uncorrected: merge an adapter that was trained on an emulator without correcting it.
        progress: called after every shard.

    Raises:
        EmlocError: the adapter does not belong to the base, or cannot be merged into it.
    """
    request = make_request("merge", adapter=adapter, output=output, base=base, allow_uncorrected=allow_uncorrected)
    return _perform(request, progress)


def export(
    source: Name,
    output: Name,
    *,
    base: Name | None = None,
    allow_uncorrected: bool = False,
    progress: OnProgress | None = None,
    **settings: Unpack[ExportKwargs],
) -> Result[ExportResult]:
    """Write an adapter or a model in the form that servers expect.

    Args:
        source: a corrected, polished or merged output, or any LoRA or model.
        output: directory of the export.
        base: for an adapter, its base model; by default the one that it names.
        allow_uncorrected: export an adapter that was trained on an emulator without correcting it.
        progress: never called: an export reports no progress.
        settings: see :class:`~emloc_core.settings.ExportSettings`: ``gguf``, ``dtype``.

    Raises:
        EmlocError: the adapter does not belong to the base, or the format cannot express the model.
    """
    content = {"source": source, "output": output, "base": base, "allow_uncorrected": allow_uncorrected}
    return _perform(make_request("export", settings, **content), progress)


def evaluate(  # noqa: PLR0913 - all by keyword
    tasks: Name | Sequence[Name],
    output: Name,
    *,
    base: Name | None = None,
    emulator: Name | None = None,
    adapter: Name | None = None,
    corrected: Name | None = None,
    polished: Name | None = None,
    merged: Name | None = None,
    full_lora: Name | None = None,
    systems: Mapping[str, Name | tuple[Name, Name]] | None = None,
    progress: OnProgress | None = None,
    **settings: Unpack[EvaluateKwargs],
) -> Result[EvaluationResult]:
    """Compare models and adapters on the same tasks with lm-eval, each in its own process.

    Args:
        tasks: task files of lm-eval, or names of its bundled tasks.
        output: directory of the results.
        base: the base model.
        emulator: output of :func:`compress`.
        adapter: output of :func:`train`.
        corrected: output of :func:`correct`.
        polished: output of :func:`polish`.
        merged: output of :func:`merge`.
        full_lora: a LoRA that was trained on the base itself.
        systems: further systems by name: a model, or a pair of a model and an adapter.
        progress: called before every system, and at the end.
        settings: ``limit``, ``batch_size``, ``chat``, ``seed``: see :class:`~emloc_core.requests.EvaluateRequest`.

    Raises:
        EmlocError: the systems, tasks, data or output directory cannot be used.
    """
    from emloc_core.evaluation.evaluate import canonical_systems

    names = [tasks] if isinstance(tasks, str | PathLike) else list(tasks)
    canonical = canonical_systems(base, emulator, adapter, corrected, polished, merged, full_lora)
    others = [_system(name, value) for name, value in (systems or {}).items()]
    request = make_request(
        "eval", tasks=tuple(fspath(task) for task in names), output=output, systems=(*canonical, *others), **settings
    )
    return _perform(request, progress)


def chat(
    model: Name,
    adapter: Name | None = None,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    seed: int | None = None,
) -> "Conversation":
    """Load a model, and an adapter if given, for a conversation: ``chat(merged).say("Hello")`` returns the answer.

    Args:
        model: a model or an emulator, or an adapter, which names its model.
        adapter: a LoRA for the model.
        system: text of a system message.
        max_new_tokens: maximum number of tokens per answer.
        temperature: 0 always takes the likeliest token; None leaves it to the model's own generation config.
        seed: seed for sampling; None gives a different answer each time.

    Raises:
        EmlocError: the model, its tokenizer or the adapter cannot be loaded, or they do not match.
    """
    from emloc_core.evaluation.conversation import open_conversation

    settings = {"system": system, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    return open_conversation(fspath(model), None if adapter is None else Path(adapter), **settings)


def convert_layout(source: Name, output: Name, *, progress: OnProgress | None = None) -> Result[ImportResult]:
    """Convert a checkpoint with another layout to that of transformers' own classes: ``emloc import``.

    Args:
        source: directory or hub id, in a layout that an installed plugin reads.
        output: directory of the checkpoint.
        progress: called after every shard.

    Raises:
        EmlocError: no layout reads the source, or it is damaged.
    """
    return _perform(make_request("import", source=source, output=output), progress)


def plan(  # noqa: PLR0913 - all by keyword
    model: Name,
    *,
    memory: str | None = None,
    headroom: str | None = None,
    ratio: float | None = None,
    kind: str = AUTO,
    data: Rows | None = None,
    split: str = "train",
    columns: ColumnNames | None = None,
    length: int | None = None,
    images: int | None = None,
    image_size: str | None = None,
    device: str = "auto",
    card: str | None = None,
    measure: bool = False,
    **settings: Unpack[PlanKwargs],
) -> "MemoryPlan":
    """Plan the memory of every stage from the config alone, and compare the ways to tune. Loads no weights.

    Args:
        model: directory, ``config.json``, registry entry, or hub id.
        memory: memory to tune in, such as ``24GiB``; by default what inference on the base needs.
        headroom: how much of it to keep free: a size, a share such as ``8%``, or ``0``; by default 5 %, at most 1 GiB.
        ratio: plan an emulator of this ratio, instead of the largest that fits.
        kind: plan an emulator of this kind; by default the best way to tune is planned, with an emulator or without.
        data: rows; the longest sets the number of tokens per row.
        split: split of a saved or hub dataset.
        columns: your names of columns, by the usual names: ``{"prompt": "question"}``.
        length: tokens per row; with ``data``, the maximum. Default: 1024.
        images: images per row. Default: those of the rows, or 1 for an image-text model.
        image_size: ``WIDTHxHEIGHT`` of every image in pixels, for a model that takes any size.
        device: device whose memory is planned: ``cuda``, ``xpu``, ``cpu``, or ``auto``, which this machine tunes on.
        card: GPU to plan for, such as ``RTX 4090``: its memory, unless one is given, and times from published figures.
        measure: measure this machine for about a second, to estimate the time of a step; has no effect if it lacks
            the planned device. Reading speed is measured on the model's files, if they are here.
        settings: fields of :class:`~emloc_core.settings.TrainSettings` in ``emloc_core.settings.MEMORY_SETTINGS``.

    Raises:
        EmlocError: the model cannot be planned, or a setting is wrong.
    """
    from emloc_core.registry.plan import plan_model

    return plan_model(
        fspath(model),
        validated(TrainSettings, settings, "See `emloc plan --help`."),
        memory=memory,
        headroom=headroom,
        ratio=ratio,
        kind=kind,
        image_size=image_size,
        device=device,
        card=card,
        measure=measure,
        data=data,
        split=split,
        columns=columns or {},
        length=length,
        images=images,
    )


def push(
    directory: Name, repository: str, *, private: bool = True, with_rows: bool = False, base: str | None = None
) -> str:
    """Upload a finished output to the Hugging Face hub, and return the address of the commit.

    Args:
        directory: output of a stage.
        repository: ``organisation/name``; created if there is none.
        private: whether a new repository is private.
        with_rows: publish the rows of your data that an emulator or an evaluation holds.
        base: hub id of the base, if the output names a path on this machine.

    Raises:
        EmlocError: the directory is not a finished output, holds rows without ``with_rows``, or the hub refuses it.
    """
    from emloc_core.files.hub import push

    return push(directory, repository, private=private, with_rows=with_rows, base=base)


def run(recipe: Name, *, progress: OnProgress | None = None, **sections: Unpack[RecipeKwargs]) -> RunResult:
    """Run all stages of a recipe, each in its own process.

    Args:
        recipe: a TOML file.
        progress: called after every item of every stage; by default the stages show their progress on stderr.
        sections: values to use instead of the recipe's: ``train={"steps": 100}``, ``merge=False``. Paths are relative
            to the recipe.

    Returns:
        The directory of the run.

    Raises:
        EmlocError: the recipe cannot be used, or a stage failed; the message names it, and earlier stages are kept.
    """
    from emloc_core.recipe.recipe import load_recipe
    from emloc_core.recipe.run import run_recipe

    with quiet() if progress else nullcontext():
        run_recipe(Path(recipe), sections, progress=progress)
    return RunResult(load_recipe(Path(recipe), sections).output)


def tune(  # noqa: PLR0913 - all by keyword
    model: Name,
    data: Rows,
    output: Name,
    *,
    memory: str = FREE,
    headroom: str | None = None,
    merge: bool = False,
    split: str = "train",
    columns: ColumnNames | None = None,
    skip_bad_rows: bool = False,
    evaluation: EvalRowsKwargs | None = None,
    paper: bool = False,
    progress: OnProgress | None = None,
    **settings: Unpack[TrainKwargs],
) -> RunResult:
    """Tune a model on rows in the available memory, in the best way that fits: all stages in one call.

    An ordinary LoRA is trained if that fits; otherwise the best emulator is made, a LoRA trained on it, corrected for
    the model, and polished by exact steps where they help. ``output`` gets all of it, a report, the answers to five
    held-out rows before and after, and ``recipe.toml``, which you can edit and pass to :func:`run`.

    Args:
        model: the model.
        data: rows of the task.
        output: directory of all outputs.
        memory: memory to tune in, such as ``24GiB``; by default the device's free memory.
        headroom: how much of it to keep free: a size, a share such as ``8%``, or ``0``; by default 5 %, at most 1 GiB.
        merge: write the merged model too.
        split: split of a saved or hub dataset.
        columns: your names of columns, by the usual names: ``{"prompt": "question"}``.
        skip_bad_rows: leave out rows that cannot be read, instead of raising.
        evaluation: rows to evaluate while training, see :func:`train`: ``data``, ``split`` and ``on_base``.
        paper: make the emulator as in the paper, for reference: low-rank factors, even where an ordinary LoRA fits.
        progress: called after every item of every stage; by default the stages show their progress on stderr.
        settings: see :func:`train`: ``steps``, ``learning_rate``, ...

    Returns:
        The directory; its ``final`` is the merged model with ``merge``, otherwise the adapter.

    Raises:
        EmlocError: the model, the rows or the settings cannot be used, no way to tune fits, or a stage failed; the
            message names it, and earlier stages are kept.
    """
    from emloc_core.data.mixture import is_splits
    from emloc_core.data.rows import EVALUATED
    from emloc_core.recipe.tune import Tune, by_name

    settle()
    with quiet() if progress else nullcontext():
        evaluated: dict[str, Any] = dict(evaluation or {})
        rows: Any = evaluated.get("data", data)
        if is_splits(rows) and evaluated.get("split") in rows:
            evaluated["data"] = rows[evaluated.pop("split")]
        if evaluated.get("data") is not None:
            evaluated["data"] = by_name(evaluated["data"], Path(output), columns=columns or {}, name=EVALUATED)
        arguments = {
            "model": fspath(model),
            "data": by_name(data, Path(output), split, columns or {}, skip_bad_rows=skip_bad_rows),
            "output": Path(output),
            "memory": memory,
            "headroom": headroom,
            "merge": merge,
            "split": split,
            "columns": columns or {},
            "skip_bad_rows": skip_bad_rows,
            "evaluation": evaluated,
            "paper": paper,
            "settings": settings,
        }
        request = validated(Tune, arguments, "See `emloc tune --help`.")
        request.run(tell=logging.getLogger("emloc.tune").info, progress=progress)
    return RunResult(Path(output))


def load_family(model: Name) -> "Family":
    """Return the family that declares a model: its towers, its input groups, and what it keeps dense.

    Raises:
        EmlocError: no installed plugin declares it.
    """
    from emloc_core.files.checkpoint import find_config, read_config_json
    from emloc_core.plugins.manager import plugin_manager

    return plugin_manager().family_for(read_config_json(find_config(fspath(model))))


def _beside(adapter: Name, word: str) -> Path:
    """Return the default output for something that is made from an adapter, beside it."""
    path = Path(adapter)
    if path.name in ("", ".."):  # the current directory, or one above it
        path = path.resolve()
    return path.with_name(f"{path.name}-{word}")


def _rows(
    data: Rows, exclude: Iterable[Name], split: str, columns: ColumnNames | None, *, skip_bad_rows: bool
) -> dict[str, Any]:
    """Return the fields of a request for its rows."""
    rows = {"data": data, "exclude": tuple(exclude), "split": split, "columns": columns or {}}
    return {**rows, "skip_bad_rows": skip_bad_rows}


def _perform(request: Request, progress: OnProgress | None, callbacks: Sequence["TrainerCallback"] = ()) -> Result[Any]:
    from emloc_core.stages.perform import finish, prepare

    settle()
    with quiet() if progress else nullcontext():
        job: Any = prepare(request)
        for text in job.warnings:
            warnings.warn(text, stacklevel=3)
        if callbacks:
            job.callbacks = tuple(callbacks)
        if progress:
            result = finish(request.stage, job, Reporter(request.stage, request.output, progress))
        elif request.stage in _WITH_A_BAR:
            result = finish(request.stage, job, None)
        else:
            result = finish(request.stage, job)
    return result if result is not None else Result(request.output)


def _with_lora(settings: Mapping[str, Any], config: "LoraConfig") -> dict[str, Any]:
    """Return settings with those of PEFT's config.

    Raises:
        EmlocError: the config sets something that has no setting, or that is also given as one.
    """
    from emloc_core.tuning.trl import lora_settings

    lora = lora_settings(config)
    if both := sorted(lora.keys() & settings.keys()):
        raise EmlocError(f"peft_config also sets {', '.join(both)}.", "Give it once.")
    return {**settings, **lora}


def _system(name: str, value: Name | tuple[Name, Name]) -> System:
    model, adapter = value if isinstance(value, tuple) else (value, None)
    return System(name=name, model=fspath(model), adapter=None if adapter is None else Path(adapter))
