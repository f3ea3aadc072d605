"""Compares systems (base, emulator, base with an adapter, ...) on the same tasks with lm-eval, one table for all.

Each system runs in a process of its own, so that the peak memory shown is its own and all of it is given back. What
is published: ``results.json``, ``table.md`` and ``samples.jsonl``, a few rows of what each system wrote.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.evaluation.system import USER_ERROR
from emloc_core.evaluation.tasks import TaskSpec, find_task
from emloc_core.files.output import Output, read_json, read_manifest, write_json
from emloc_core.report.table import COSTS, ORDER

RESULTS, TABLE, SAMPLES = "results.json", "table.md", "samples.jsonl"
_NAME = re.compile(r"[A-Za-z0-9][\w+.-]*")


@dataclass(frozen=True)
class System:
    """What is evaluated: a model directory (base, emulator, merged), alone or with a PEFT adapter on it."""

    name: str
    model: Path
    adapter: Path | None = None


def canonical_systems(
    base: Path | None = None,
    emulator: Path | None = None,
    adapter: Path | None = None,
    corrected: Path | None = None,
    merged: Path | None = None,
    full_lora: Path | None = None,
) -> list[System]:
    """Return the systems that can be made of what there is, in the order of the table.

    Raises:
        EmlocError: an adapter is given without the model that it goes on.
    """
    for option, value in (("--corrected", corrected), ("--full-lora", full_lora)):
        if value is not None and base is None:
            raise EmlocError(f"{option} {value} goes on the base model, which is not given.", "Add --base.")
    if adapter is not None and base is None and emulator is None:
        raise EmlocError(f"--adapter {adapter} needs a model to go on.", "Add --emulator, --base or both.")
    found: dict[str, tuple[Path | None, Path | None]] = {
        "base": (base, None),
        "emulator": (emulator, None),
        "emulator+lora": (emulator if adapter else None, adapter),
        "base+uncorrected": (base if adapter else None, adapter),
        "base+corrected": (base if corrected else None, corrected),
        "merged": (merged, None),
        "full_lora": (base if full_lora else None, full_lora),
    }
    ordered = [(name, *found[name]) for name in ORDER]
    return [System(name, model, lora) for name, model, lora in ordered if model is not None]


def check_adapters(systems: Sequence[System], cache_dir: Path) -> None:
    """Refuse adapters that do not belong where :func:`canonical_systems` puts them.

    An adapter that EMLoC wrote knows the fingerprint of its model; another is only looked at for its correction.

    Args:
        systems: what :func:`canonical_systems` returned.
        cache_dir: where hashes of the models' files are cached.

    Raises:
        EmlocError: a corrected adapter stands for an uncorrected one or the reverse, one of them cannot be carried
            over, or an adapter was made for another model.
    """
    from emloc_core.adapters.adapter import Adapter
    from emloc_core.files.checkpoint import Checkpoint

    for system in systems:
        if system.adapter is None:
            continue
        corrected = system.name == "base+corrected"
        if system.name != "full_lora" and Adapter(system.adapter).is_corrected != corrected:
            found, option = ("not corrected", "--corrected") if corrected else ("corrected", "--adapter")
            raise EmlocError(
                f"{option} {system.adapter} is {found}.",
                "Give what `emloc train` made as --adapter, and what `emloc correct` made of it as --corrected.",
            )
        manifest = read_manifest(system.adapter)
        if manifest is None or system.name == "base+uncorrected":  # which was made for the emulator
            continue
        known = manifest.get("request", {}).get("base" if corrected else "model")
        if known != Checkpoint(system.model).fingerprint(cache_dir):
            raise EmlocError(
                f"The adapter {system.adapter} was made for another model than {system.model} ({system.name}).",
                "Give the model that it was made for, or --system NAME=MODEL+ADAPTER to try them all the same.",
            )


def evaluate(
    systems: Sequence[System],
    tasks: Sequence[str],
    output: Path,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate systems on tasks and publish the comparison in ``output``.

    The same call again returns what is there; after an interruption, systems that are done are not evaluated again.

    Args:
        systems: what to compare.
        tasks: paths of task files in lm-eval's YAML, or names of its bundled tasks (their data come from the hub).
        output: directory to make.
        limit: take the first so many rows of every task.
        batch_size: rows a batch.
        chat: whether prompts go through the chat template; None: where a task's rows are conversations.
        seed: of Python, numpy, torch and the choice of few-shot examples.
        progress: is told a line before each system.

    Returns:
        ``systems``: name -> metrics by name, ``seconds`` and ``peak_bytes``, in the given order. ``nll`` is the mean
        loss a token in nats, of tasks of a log-likelihood; a metric that two tasks have is ``TASK.METRIC``.
        ``stderr``: name -> metric -> standard error over the rows. ``metrics``: name -> ``task``,
        ``higher_is_better``. ``tasks``: name -> ``output_type``, ``rows``.

    Raises:
        EmlocError: systems, tasks, data or the output directory are not as they must be; names which.
    """
    settings = {"limit": limit, "batch_size": batch_size, "chat": chat, "seed": seed}
    specs = _specs(tasks, output.parent)
    request = {**_request(systems, specs, output.parent), **settings}
    published = Output(output, "evaluation", request)
    if published.is_finished():
        return _read(output, systems)
    with published.build() as staging:
        parts = {}
        for number, system in enumerate(systems, start=1):
            result = staging / f".{system.name}.json"
            if not result.exists():
                if progress:
                    progress(f"{system.name} ({number} of {len(systems)})")
                _run(system, specs, settings, result)
            parts[system.name] = read_json(result)
        results = _combine(parts)
        _publish(staging, results, parts)
        published.result = {
            name: {metric: value for metric, value in row.items() if metric not in COSTS}
            for name, row in results["systems"].items()
        }
        published.timing["systems"] = {
            name: {cost: row[cost] for cost in COSTS} for name, row in results["systems"].items()
        }
    return _read(output, systems)


def plan(systems: Sequence[System], tasks: Sequence[str]) -> dict[str, Any]:
    """Check everything that :func:`evaluate` needs, and return what it would do. Writes nothing.

    Raises:
        EmlocError: as :func:`evaluate`.
    """
    with TemporaryDirectory() as cache_dir:
        specs = _specs(tasks, Path(cache_dir))
    _check(systems, specs)
    return {
        "systems": {
            system.name: {"model": str(system.model), "adapter": str(system.adapter) if system.adapter else None}
            for system in systems
        },
        "tasks": {spec.name: str(spec.path or "lm-eval") for spec in specs},
    }


def _specs(tasks: Sequence[str], cache_dir: Path) -> list[TaskSpec]:
    if not tasks:
        raise EmlocError("There is no task to evaluate on.", "Give a task file; `emloc eval --new-task` writes one.")
    specs = [find_task(task, cache_dir) for task in tasks]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise EmlocError(f"Two tasks are called {name!r}.", "Give each its own `task:` name.")
    return specs


def _check(systems: Sequence[System], specs: Sequence[TaskSpec]) -> None:
    from emloc_core.adapters.adapter import CONFIG
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.plugins.manager import plugin_manager

    if not systems:
        raise EmlocError("There is no system to evaluate.", "Give --base, --emulator or --system NAME=MODEL.")
    names = [system.name for system in systems]
    for system in systems:
        if not _NAME.fullmatch(system.name):
            raise EmlocError(f"{system.name!r} is no name of a system.", "Use letters, digits and + . _ - in it.")
        if names.count(system.name) > 1:
            raise EmlocError(f"Two systems are called {system.name!r}.", "Give each its own name.")
        family = plugin_manager().family_for(Checkpoint(system.model).config)
        shown = next((spec.name for spec in specs if spec.shows_images), None)
        if shown and family.modality == "text":
            raise EmlocError(
                f"The task {shown} shows images, and {system.model} ({system.name}) is of the family {family.name},"
                " which reads text alone.",
                "Give a model for images and text, or another task.",
            )
        if system.adapter and not (system.adapter / CONFIG).is_file():
            raise EmlocError(f"{system.adapter} has no {CONFIG}.", "Give the directory of a PEFT adapter.")


def _request(systems: Sequence[System], specs: Sequence[TaskSpec], cache_dir: Path) -> dict[str, Any]:
    from emloc_core.adapters.adapter import fingerprint
    from emloc_core.files.checkpoint import Checkpoint

    _check(systems, specs)
    described = {
        system.name: {
            "model": Checkpoint(system.model).fingerprint(cache_dir),
            "adapter": fingerprint(system.adapter, cache_dir) if system.adapter else None,
        }
        for system in systems
    }
    return {"systems": described, "tasks": {spec.name: spec.digest for spec in specs}, "lm-eval": version("lm-eval")}


def _run(system: System, specs: Sequence[TaskSpec], settings: Mapping[str, Any], result: Path) -> None:
    """Evaluate one system in a process of its own; it writes ``result``."""
    job = result.with_suffix(".job")
    write_json(
        job,
        {
            "model": str(system.model.resolve()),
            "adapter": str(system.adapter.resolve()) if system.adapter else None,
            "tasks": [{"name": spec.name, "path": str(spec.path) if spec.path else None} for spec in specs],
            "settings": dict(settings),
            "result": str(result.resolve()),
        },
    )
    environment = {
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "10000",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
    }
    log = result.with_suffix(".log")
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "emloc_core.evaluation.system", str(job)]
        code = subprocess.run(command, env=environment, stdout=stream, stderr=stream, check=False).returncode
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no word of why"
    job.unlink()
    if code not in (0, USER_ERROR) or (code == 0 and not result.exists()):
        reason = f"it was killed by signal {-code}, as when memory runs out" if code < 0 else last
        raise EmlocError(
            f"Evaluating the system {system.name} failed: {reason} (all that it said: {log}).",
            "Run the same command again: the systems that are done are kept.",
            resumable=True,
        )
    log.unlink()
    if code == USER_ERROR:
        done = any(result.parent.glob(".*.json"))  # other systems' results are not lost for this one's fault
        raise EmlocError(f"The system {system.name} cannot be evaluated: {last}", resumable=done)


def _combine(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Lay the systems' results side by side, each metric under one name."""
    first = next(iter(parts.values()))["tasks"]
    owners: dict[str, list[str]] = {}
    for task, found in first.items():
        for metric in found["metrics"]:
            owners.setdefault(metric, []).append(task)
    metrics, systems, stderr = {}, {}, {}
    for name, part in parts.items():
        row, errors = {}, {}
        for task, found in part["tasks"].items():
            for metric, value in found["metrics"].items():
                label = metric if len(owners[metric]) == 1 else f"{task}.{metric}"
                metrics[label] = {"task": task, "higher_is_better": value["higher_is_better"]}
                row[label], errors[label] = value["value"], value["stderr"]
        systems[name] = {**row, "seconds": part["seconds"], "peak_bytes": part["peak_bytes"]}
        stderr[name] = errors
    tasks = {name: {key: found[key] for key in ("output_type", "rows")} for name, found in first.items()}
    return {"systems": systems, "stderr": stderr, "metrics": metrics, "tasks": tasks}


def _publish(staging: Path, results: dict[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
    from emloc_core.report import table as report

    write_json(staging / RESULTS, results)
    table = report.markdown(results["systems"], results["metrics"])
    (staging / TABLE).write_text(f"{table}\n{report.note(results)}\n", encoding="utf-8")
    samples = [{"system": name, **sample} for name, part in parts.items() for sample in part["samples"]]
    samples.sort(key=lambda sample: (sample["task"], sample["row"]))  # stable: systems stay in the table's order
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    (staging / SAMPLES).write_text("".join(lines), encoding="utf-8")
    for name in parts:
        (staging / f".{name}.json").unlink()


def _read(output: Path, systems: Sequence[System]) -> dict[str, Any]:
    """Read the published results and put the systems into the given order, which the file does not keep."""
    results = read_json(output / RESULTS)
    return {**results, "systems": {system.name: results["systems"][system.name] for system in systems}}
