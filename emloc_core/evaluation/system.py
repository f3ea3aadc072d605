"""Evaluates one system, a model with or without an adapter, with lm-eval, in this process.

lm-eval asks one question per row. In a task file whose ``doc_to_text`` names a column of messages, the question is all
of the conversation before the last answer, in the model's own chat template, as in tuning.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import click

from emloc_core.compat.lm_eval import answer_tokens, ask, without_environment
from emloc_core.data.chat_template import answer_render, encode_conversation
from emloc_core.data.row import parse_row
from emloc_core.errors import EmlocError, is_out_of_memory
from emloc_core.evaluation.images import shows_pictures
from emloc_core.evaluation.loading import load_system
from emloc_core.evaluation.tasks import TaskSpec, is_conversational, load_task
from emloc_core.files.meter import Meter, peak_memory

#: Number of generated rows to keep per task, for people to read.
SAMPLES = 6


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
        batch_size: rows per batch; halved where memory runs out.
        chat: whether to use the chat template; None: if the rows are conversations.
        seed: seed for Python, NumPy, torch and the choice of few-shot examples.

    Returns:
        ``tasks``: task name -> ``output_type``, ``rows``, and ``metrics``: name -> ``value``, ``stderr`` (or None),
        ``higher_is_better``; ``samples``: a few generated rows.

    Raises:
        EmlocError: a chat template, a picture or its place in the prompt is missing; or one row does not fit in memory.
    """
    groups: dict[tuple[bool, bool], list[Any]] = defaultdict(list)
    for task in tasks:
        groups[is_conversational(task) if chat is None else chat, shows_pictures(task)].append(task)
    result: dict[str, Any] = {"tasks": {}, "samples": []}
    for (with_template, images), members in groups.items():
        evaluated = partial(_evaluated, model, processing, members, with_template, images, limit=limit, seed=seed)
        lm, output = _with_rows_that_fit(batch_size, evaluated)
        for task in members:
            logged = output["samples"][task.task_name]  # a row once per filter
            rows = [row for row in logged if row["filter"] == logged[0]["filter"]]
            result["tasks"][task.task_name] = {
                "output_type": task.OUTPUT_TYPE,
                "rows": len(rows),
                "metrics": _metrics(lm, task, output, rows),
            }
            if task.OUTPUT_TYPE == "generate_until":
                result["samples"] += [_sample(task.task_name, row) for row in rows[:SAMPLES]]
    return result


def _evaluated(
    model: Any,
    processing: Any,
    tasks: Sequence[Any],
    with_template: bool,
    images: bool,
    batch_size: int,
    *,
    limit: int | None,
    seed: int,
) -> tuple[Any, Any]:
    """Return lm-eval's model, and its results for tasks that all have a chat template or images, or all have none."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from emloc_core.evaluation.multimodal_lm import ImageTextLM
    from emloc_core.evaluation.text_lm import TextLM

    tokenizer = processing if images else getattr(processing, "tokenizer", processing)
    lm = (ImageTextLM if images else TextLM)(model, tokenizer=tokenizer, batch_size=batch_size)
    if with_template and not tokenizer.chat_template:
        raise EmlocError(
            f"The task {tasks[0].task_name} needs a chat template, but the model has none.",
            "Use --no-chat, or rows of prompt and completion as strings.",
            code="missing",
        )
    for task in filter(asks_conversations, tasks):
        if not with_template:
            raise EmlocError(
                f"The task {task.task_name} has conversations of several turns.",
                "Leave out --no-chat: they need the chat template.",
            )
        ask_conversations(task, lm)
    with without_environment():
        output = simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),  # else it reads thousands of files
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=with_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return lm, output


def _with_rows_that_fit(batch_size: int, evaluated: Callable[[int], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return what is evaluated with so many rows per batch, or with half of them as often as memory runs out."""
    from accelerate.utils.memory import clear_device_cache

    while True:
        try:
            return evaluated(batch_size)
        except Exception as error:
            if isinstance(error, EmlocError) or not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise EmlocError(
                    "The device ran out of memory with one row per batch.",
                    "Free some, give shorter rows, or use a machine with more.",
                    code="memory",
                ) from error
        batch_size //= 2  # below the handler, which keeps what the error's frames hold
        clear_device_cache(garbage_collection=True)
        click.echo(f"emloc: memory ran out; evaluating {batch_size} rows at a time instead", err=True)


def token_nll(lm: Any, rows: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean negative log-likelihood per token in nats, and its standard error.

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
    return mean, math.sqrt(spread * n / (n - 1)) / total if n > 1 else math.nan


def _tokens(lm: Any, context: str, continuation: str | None = None, images: Any = None) -> int:
    if images is not None:  # images: lm is an ImageTextLM
        return len(lm.answer_ids(continuation))
    if continuation is None:  # rolling: all of the text, after lm-eval's prefix token
        return len(lm.tok_encode(context))
    if context:
        return len(answer_tokens(lm, context, continuation))
    tokens = lm.tok_encode(continuation, add_special_tokens=False)
    return len(tokens) - (tokens[0] == lm.prefix_token_id)


def _metrics(lm: Any, task: Any, output: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    higher = output["higher_is_better"][task.task_name]
    metrics: dict[str, Any] = {}
    if task.OUTPUT_TYPE in ("loglikelihood", "loglikelihood_rolling"):
        mean, stderr = token_nll(lm, rows)
        if math.isnan(mean):
            raise EmlocError(
                f"The loss on the task {task.task_name} is not a number.",
                "Check the weights; training may have diverged.",
                code="not-finite",
            )
        metrics["nll"] = {"value": mean, "stderr": None if math.isnan(stderr) else stderr, "higher_is_better": False}
    several = len({key.partition(",")[2] for key in output["results"][task.task_name] if "," in key}) > 1
    for key, value in output["results"][task.task_name].items():
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


def _sample(task: str, row: dict[str, Any]) -> dict[str, Any]:
    prompt, written = row["arguments"][0][0], row["resps"][0][0]
    return {"task": task, "row": row["doc_id"], "prompt": prompt, "expected": str(row["target"]), "written": written}


def evaluate_system(
    model: str, adapter: str | None, tasks: list[dict[str, str | None]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate one system; called in its own process, so that its peak memory is measured separately.

    Args:
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


def asks_conversations(task: Any) -> bool:
    """Return whether ``doc_to_text`` of an lm-eval task names a column of messages."""
    column, row = task.config.doc_to_text, task.eval_docs[0]
    return isinstance(column, str) and isinstance(row, dict) and isinstance(row.get(column), list)


def ask_conversations(task: Any, lm: Any) -> None:
    """Make an lm-eval task ask conversations.

    When its requests are built, it raises an EmlocError if a row is no conversation, or the chat template rejects it.
    """
    numbers = count(1)

    def context(doc: Any, **_: Any) -> str:
        number = next(numbers)
        row = parse_row(doc, f"The task {task.task_name}, row {number}", number)
        encode_conversation(row, lm.tokenizer)  # refuses what the template rejects or leaves out
        question: Any = [*(row.prompt or []), *(row.completion or [])][:-1]
        return lm.ask(question, answer_render(lm.tokenizer, row.tools))

    if task.config.num_fewshot:
        raise EmlocError(f"The task {task.task_name} has conversations of several turns.", "Leave out num_fewshot.")
    ask(task, context)
