"""Checks that a task file from a registry entry is data only: lm-eval would run code from many other keys.

Functions, metrics from the hub and prompts in other files are or become code; they are refused, as is every key that is
not known to be data. Templates are rendered in a sandbox, see :func:`emloc_core.evaluation.tasks.load_task`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.evaluation.tasks import LOCAL_FORMATS, data_files, named_functions, read_task, with_absolute_data

_KEYS = {
    "task", "task_alias", "tag", "dataset_path", "dataset_name", "dataset_kwargs", "training_split",
    "validation_split", "test_split", "fewshot_split", "output_type", "description", "doc_to_text", "doc_to_target",
    "doc_to_choice", "doc_to_image", "target_delimiter", "fewshot_delimiter", "gen_prefix", "num_fewshot",
    "generation_kwargs", "filter_list", "metric_list", "repeats", "metadata",
}  # fmt: skip
#: lm-eval's own metrics: it looks up any other name on the hub, and runs what it finds.
_METRICS = {
    "acc", "acc_all", "acc_bytes", "acc_mutual_info", "acc_norm", "bits_per_byte", "bleu", "brier_score", "bypass",
    "byte_perplexity", "chrf", "chrf++", "exact_match", "f1", "likelihood", "mcc", "perplexity", "ter",
    "word_perplexity",
}  # fmt: skip


def require_data_alone(path: Path, directory: Path) -> None:
    """Refuse a task file that would run code, or that names files outside ``directory`` (links are followed)."""
    if not path.is_file():
        raise EmlocError(f"There is no task file {path}.", "Correct the entry that names it.", code="missing")
    files, content = read_task(path)
    data = [Path(file) for file in data_files(with_absolute_data(content, path))]
    root = directory.resolve()
    outside = [file for file in (*files, *data) if not file.resolve().is_relative_to(root)]
    for reason in (*_code(content), *(f"names {file}, outside its directory" for file in outside)):
        raise EmlocError(
            f"The task file {path} of an entry {reason}.",
            "Entries may not run code or leave their directory; `emloc eval` runs your own task files.",
            code="refused",
        )


def _code(content: dict[str, Any]) -> Iterator[str]:
    """Yield everything that could run code."""
    for name in named_functions(content):
        yield f"calls the function {name}"
    for key in content:
        if key not in _KEYS:
            yield f"has the key {key!r}, which is not known to be data"
    settings = content.get("dataset_kwargs")
    files = settings.get("data_files") if isinstance(settings, dict) else None
    if content.get("dataset_path") not in LOCAL_FORMATS or set(settings or {}) != {"data_files"} or "://" in str(files):
        yield "has data other than files of rows beside it"
    for metric in content.get("metric_list") or []:
        is_known = isinstance(metric, dict) and metric.get("metric") in _METRICS and "hf_evaluate" not in metric
        if not is_known:
            yield f"has the metric {metric!r}, which lm-eval would download and run"
