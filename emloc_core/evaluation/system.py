"""Loads one system, a model with or without an adapter, and evaluates it with lm-eval, in this process."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from emloc_core.compat.lm_eval import answer_tokens
from emloc_core.errors import EmlocError, first_line
from emloc_core.evaluation.conversations import ask_conversations, asks_conversations
from emloc_core.evaluation.images import shows_pictures
from emloc_core.evaluation.tasks import TaskSpec, is_conversational, load_task
from emloc_core.files.meter import Meter, peak_memory
from emloc_core.units import human_bytes

#: Number of generated rows to keep per task, for people to read.
SAMPLES = 6
#: Share of a GPU's free memory that a model may take, and that the layers of one may take which does not fit: what
#: else there is at a time, a layer from the CPU's memory and the cache of keys and values, takes the rest.
_WHOLE, _PART = 0.9, 0.6


def load_system(model: Path, adapter: Path | None, *, images: bool | None = False) -> tuple[Any, Any]:
    """Load a model, its adapter if there is one, and its tokenizer; on the GPU if there is one.

    Where the model does not fit the GPU, the layers that do not wait in CPU memory, and are copied when they are used.

    Args:
        model: directory of the model.
        adapter: directory of a PEFT adapter.
        images: whether there are images: then the model's processor is returned, which contains the tokenizer. None:
            it is returned if the model reads images and has one.

    Raises:
        EmlocError: the model cannot be loaded, does not fit in memory, does not read images or has no processor though
            there are images, or the adapter does not fit it.
    """
    import torch

    from emloc_core.data.tokenize import load_processor, load_tokenizer
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.files.manifest import read_manifest
    from emloc_core.files.pretrained import load_model
    from emloc_core.observed.record import recall
    from emloc_core.plugins.manager import plugin_manager

    checkpoint = Checkpoint(model)
    recall(read_manifest(model))
    family = plugin_manager().family_for(checkpoint.config)
    if images is None:
        images = family.modality != "text" and any(model.glob("*processor_config.json"))
    if images and family.modality == "text":
        raise EmlocError(f"A task shows images, and models of the family {family.name} read text only.",
                         code="mismatch")  # fmt: skip
    processing = load_processor(model) if images else load_tokenizer(model)
    parts = _parts(checkpoint.nbytes)
    try:
        loaded = load_model(family.auto_class, model, device_map="auto" if parts else None, max_memory=parts)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise EmlocError(f"The model {model} cannot be loaded ({reason}).", "Check the directory.") from error
    _require_memory(loaded)
    if adapter is not None:
        loaded = _add_adapter(loaded, adapter, parts)
    if not parts:
        loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded.eval(), processing


def _parts(nbytes: int) -> dict[int | str, int] | None:
    """Return how many bytes of a model to place on which device; None: all of it on one.

    Raises:
        EmlocError: it does not fit in the memory of GPU and CPU together.
    """
    import psutil
    import torch

    from emloc_core.model.device import free_of

    if not torch.cuda.is_available():
        return None
    free = [free_of(gpu) for gpu in range(torch.cuda.device_count())]
    if nbytes <= _WHOLE * free[0]:
        return None
    parts: dict[int | str, int] = {gpu: int(_PART * room) for gpu, room in enumerate(free)}
    parts["cpu"] = psutil.virtual_memory().available
    if nbytes > sum(parts.values()):
        raise EmlocError(
            f"The model has {human_bytes(nbytes)}, and GPU and CPU have room for {human_bytes(sum(parts.values()))}.",
            "Free memory, or use a machine with more.",
            code="memory",
        )
    click.echo(
        f"emloc: the model has {human_bytes(nbytes)}, and the GPU {human_bytes(free[0])} free: layers that do not fit "
        "are copied from CPU memory whenever they are used, which is slow",
        err=True,
    )
    return parts


def _require_memory(model: Any) -> None:
    """Refuse layers on disk, where accelerate puts what GPU and CPU have no room for.

    Every token would wait for them, and PEFT would write a copy of them into the working directory.

    Raises:
        EmlocError: a layer is on disk.
    """
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise EmlocError(
            "GPU and CPU have too little free memory for the model's layers.",
            "Free memory, or use a machine with more.",
            code="memory",
        )


def _add_adapter(model: Any, adapter: Path, parts: dict[int | str, int] | None) -> Any:
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    from emloc_core.files.pretrained import load_lora

    try:
        # Not HFLM(peft=...), which is silently ignored if the model is an object.
        with warnings.catch_warnings():
            # torch warns about each weight that waits elsewhere; the LoRA itself is loaded.
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            combined = load_lora(model, adapter, max_memory=parts)
        with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as file:
            given = set(file.keys())
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise EmlocError(f"The adapter {adapter} cannot be put on the model ({reason}).", "Check both.") from error
    differing = sorted(given ^ set(get_peft_model_state_dict(combined)))
    if differing:  # PEFT only warns, and leaves these layers unchanged
        raise EmlocError(
            f"The adapter {adapter} does not fit the model: {len(differing)} of its tensors have no place or are"
            f" missing, {differing[0]} for one.",
            "Use it on the model that it was trained for.",
            code="mismatch",
        )
    return combined


def run_tasks(
    model: Any,
    processing: Any,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run tasks on a model object.

    Args:
        model: a transformers or PEFT model.
        processing: its tokenizer, or its processor if a task shows images.
        tasks: from :func:`load_task`.
        limit: use only this many rows of each task.
        batch_size: rows per batch.
        chat: whether to use the chat template; None: if the rows are conversations.
        seed: seed for Python, NumPy, torch and the choice of few-shot examples.

    Returns:
        ``tasks``: task name -> ``output_type``, ``rows``, and ``metrics``: name -> ``value``, ``stderr`` (or None),
        ``higher_is_better``; ``samples``: a few generated rows.

    Raises:
        EmlocError: a chat template, a picture or its place in the prompt is missing.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    groups: dict[tuple[bool, bool], list[Any]] = defaultdict(list)
    for task in tasks:
        groups[is_conversational(task) if chat is None else chat, shows_pictures(task)].append(task)
    result: dict[str, Any] = {"tasks": {}, "samples": []}
    for (with_template, images), members in groups.items():
        lm = _lm(model, processing, images, batch_size)
        if with_template and not (processing if images else lm.tokenizer).chat_template:
            raise EmlocError(
                f"The task {members[0].task_name} needs a chat template, and the model has none.",
                "Use --no-chat, or rows of prompt and completion as strings.",
                code="missing",
            )
        for task in filter(asks_conversations, members):
            if not with_template:
                raise EmlocError(
                    f"The task {task.task_name} asks conversations of several turns.",
                    "Leave out --no-chat: they need the chat template.",
                )
            ask_conversations(task, lm.tokenizer)
        found = simple_evaluate(
            model=lm,
            tasks=members,
            task_manager=TaskManager(include_defaults=False),  # else it reads thousands of files
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=with_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        for task in members:
            rows = _first_filter(found["samples"][task.task_name])
            result["tasks"][task.task_name] = {
                "output_type": task.OUTPUT_TYPE,
                "rows": len(rows),
                "metrics": _metrics(lm, task, found, rows),
            }
            if task.OUTPUT_TYPE == "generate_until":
                result["samples"] += [_sample(task.task_name, row) for row in rows[:SAMPLES]]
    return result


def _lm(model: Any, processing: Any, images: bool, batch_size: int) -> Any:
    """Return lm-eval's model for tasks that either all show images, or all show none."""
    from lm_eval.models.huggingface import HFLM

    from emloc_core.evaluation.multimodal_lm import ImageTextLM

    if images:
        return ImageTextLM(model, tokenizer=processing, softmax_dtype="float32", batch_size=batch_size)
    tokenizer = getattr(processing, "tokenizer", processing)
    return HFLM(model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=batch_size)


def token_nll(lm: Any, rows: Iterable[dict[str, Any]]) -> tuple[float, float, int]:
    """Return the mean negative log-likelihood per token in nats, its standard error, and the number of tokens.

    Tokens are counted as lm-eval scores them. (Whitespace at the end of a prompt belongs to the continuation, so a
    chat template that ends in a line break adds one nearly certain token to every answer; after images only the answer
    is scored.) lm-eval's own ``perplexity`` is per sequence, and grows with length.

    Args:
        lm: lm-eval's model, whose tokenizer counts.
        rows: logged samples of a task of type ``loglikelihood`` or ``loglikelihood_rolling``.
    """
    pairs = []  # (negative log-likelihood, tokens) of each row
    for row in rows:
        response = row["resps"][0][0]
        loglikelihood = response[0] if isinstance(response, tuple | list) else response
        pairs.append((-float(loglikelihood), _tokens(lm, *row["arguments"][0])))
    total = sum(tokens for _, tokens in pairs)
    mean = sum(nll for nll, _ in pairs) / total
    spread = sum((nll - mean * tokens) ** 2 for nll, tokens in pairs)
    n = len(pairs)
    return mean, math.sqrt(spread * n / (n - 1)) / total if n > 1 else math.nan, total


def _tokens(lm: Any, context: str, continuation: str | None = None, shown: Any = None) -> int:
    if shown is not None:  # images: lm is an ImageTextLM
        return len(lm.answer_ids(continuation))
    if continuation is None:  # rolling: all of the text, after lm-eval's prefix token
        return len(lm.tok_encode(context))
    if context:
        return len(answer_tokens(lm, context, continuation))
    tokens = lm.tok_encode(continuation, add_special_tokens=False)
    return len(tokens) - (tokens[0] == lm.prefix_token_id)


def _metrics(lm: Any, task: Any, found: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    higher = found["higher_is_better"][task.task_name]
    metrics: dict[str, Any] = {}
    if task.OUTPUT_TYPE in ("loglikelihood", "loglikelihood_rolling"):
        mean, stderr, _ = token_nll(lm, rows)
        if math.isnan(mean):
            raise EmlocError(
                f"The loss on the task {task.task_name} is not a number.",
                "Check the weights; training may have diverged.",
                code="not-finite",
            )
        metrics["nll"] = {"value": mean, "stderr": None if math.isnan(stderr) else stderr, "higher_is_better": False}
    several = len({key.partition(",")[2] for key in found["results"][task.task_name] if "," in key}) > 1
    for key, value in found["results"][task.task_name].items():
        name, comma, filter_name = key.partition(",")
        skipped = name.endswith("_stderr") or (name == "perplexity" and task.OUTPUT_TYPE == "loglikelihood")
        if not comma or skipped or not isinstance(value, int | float):
            continue
        spread = _stderr([row.get(name) for row in rows], float(value))
        label = f"{name}({filter_name})" if several else name
        metrics[label] = {"value": float(value), "stderr": spread, "higher_is_better": higher.get(name)}
    return metrics


def _stderr(values: list[Any], mean: float) -> float | None:
    """Return the standard error of a metric that is a mean over rows; None for others."""
    n = len(values)
    if n < 2 or not all(isinstance(value, int | float) for value in values) or not math.isclose(sum(values) / n, mean):
        return None
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _first_filter(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one logged sample per row; lm-eval logs a row once per filter."""
    return [row for row in rows if row["filter"] == rows[0]["filter"]]


def _sample(task: str, row: dict[str, Any]) -> dict[str, Any]:
    prompt, written = row["arguments"][0][0], row["resps"][0][0]
    return {"task": task, "row": row["doc_id"], "prompt": prompt, "expected": str(row["target"]), "written": written}


def evaluate_system(
    model: str, adapter: str | None, tasks: list[dict[str, str | None]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate one system; called in its own process, so that its peak memory is measured separately.

    Args:
        model: directory of the model.
        adapter: directory of a PEFT adapter, if there is one.
        tasks: ``name`` and ``path`` of each; no path for a bundled task.
        settings: settings of :func:`run_tasks`.

    Returns:
        The result of :func:`run_tasks`, with ``seconds`` and ``peak_bytes``.

    Raises:
        EmlocError: model, adapter or tasks are wrong.
    """
    import logging

    from emloc_core.model.cap import keep_to_cap

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    keep_to_cap()
    meter = Meter()
    specs = [TaskSpec(str(task["name"]), Path(task["path"]) if task["path"] else None) for task in tasks]
    loaded = [task for spec in specs for task in load_task(spec)]
    system = load_system(Path(model), Path(adapter) if adapter else None, images=any(map(shows_pictures, loaded)))
    result: dict[str, Any] = run_tasks(*system, loaded, **settings)
    reading = meter.read()
    result["seconds"] = reading["seconds"]
    result["peak_bytes"] = peak_memory(reading)
    return result
