"""Compares systems (base, emulator, base with an adapter, ...) on the same tasks with lm-eval, in one table.

Each system runs in its own process, so that its peak memory is measured separately and all of it is released.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

from emloc_core.errors import EmlocError
from emloc_core.evaluation.tasks import TaskSpec, find_task, require_bundled
from emloc_core.files.checkpoint import Checkpoint, open_checkpoint
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.inputs import Inputs
from emloc_core.files.job import Job, Progress
from emloc_core.files.lora import require_lora
from emloc_core.files.manifest import MANIFEST, read_manifest
from emloc_core.files.output import Output
from emloc_core.plugins.manager import plugin_manager
from emloc_core.processes.call import ProcessDiedError, call
from emloc_core.report.table import COSTS, ORDER
from emloc_core.requests import EvaluateRequest, System

Name = str | PathLike[str]
#: Systems whose adapter was trained on the base itself, and is never corrected.
_ON_THE_BASE = {"base+polished", "exact_alone", "full_lora"}
RESULTS, TABLE, SAMPLES = "results.json", "table.md", "samples.jsonl"
_NAME = re.compile(r"[A-Za-z0-9][\w+.-]*")


def canonical_systems(
    base: Name | None = None,
    emulator: Name | None = None,
    adapter: Name | None = None,
    corrected: Name | None = None,
    polished: Name | None = None,
    merged: Name | None = None,
    full_lora: Name | None = None,
) -> list[System]:
    """Return the systems that these models and adapters make up, in the order of the table.

    Raises:
        EmlocError: an adapter is given without its model.
    """
    for option, value in (("corrected", corrected), ("polished", polished), ("full-lora", full_lora)):
        if value is not None and base is None:
            raise EmlocError(f"--{option} {value} needs the base model.", "Add --base.")
    if adapter is not None and base is None and emulator is None:
        raise EmlocError(f"--adapter {adapter} needs a model.", "Add --emulator, --base or both.")
    models: dict[str, tuple[Name | None, Name | None]] = {
        "base": (base, None),
        "emulator": (emulator, None),
        "emulator+lora": (emulator if adapter else None, adapter),
        "base+uncorrected": (base if adapter else None, adapter),
        "base+corrected": (base if corrected else None, corrected),
        "base+polished": (base if polished else None, polished),
        "merged": (merged, None),
        "full_lora": (base if full_lora else None, full_lora),
    }
    ordered = [(name, *models[name]) for name in ORDER if name in models]
    return [
        System(name=name, model=fspath(model), adapter=None if lora is None else Path(lora))
        for name, model, lora in ordered
        if model is not None
    ]


class _Opened(NamedTuple):
    """A system whose model is open."""

    name: str
    model: Checkpoint
    adapter: Path | None


def _check_adapters(systems: Sequence[_Opened], files: Inputs) -> None:
    """Refuse adapters that do not belong to the models that :func:`canonical_systems` puts them on.

    Adapters from EMLoC record the fingerprint of their model; of others, only whether they are corrected is checked.
    """
    from emloc_core.adapters.adapter import Adapter
    from emloc_core.adapters.belonging import is_on_rounded

    for system in systems:
        if system.adapter is None or system.name not in ORDER:
            continue
        corrected = system.name == "base+corrected"
        if system.name not in _ON_THE_BASE and Adapter(system.adapter).is_corrected != corrected:
            state, option = ("not corrected", "--corrected") if corrected else ("corrected", "--adapter")
            raise EmlocError(
                f"{option} {system.adapter} is {state}.",
                "Give the adapter from `emloc train` as --adapter, and the one from `emloc correct` as --corrected.",
                code="mismatch",
            )
        manifest = read_manifest(system.adapter)
        if manifest is None or system.name == "base+uncorrected":  # made for the emulator
            continue
        request = manifest.get("request", {})
        on_base = corrected or "emulator" not in request  # missing in a copy of an adapter trained on the base
        expected = request.get("model") or (request.get("base") if on_base else None)
        if expected == system.model.fingerprint(files):
            continue
        if system.name not in _ON_THE_BASE or not is_on_rounded(Adapter(system.adapter), system.model):
            raise EmlocError(
                f"The adapter {system.adapter} was made for a model other than {system.model.directory} "
                f"({system.name}).",
                "Give the model that it was made for, or --system NAME=MODEL+ADAPTER to try them anyway.",
                code="mismatch",
            )


class Evaluate(Job):
    """A comparison. The constructor makes cheap checks; :meth:`run` publishes the results.

    They are ``results.json`` with

    - ``systems``: name -> metrics by name, ``seconds`` and ``peak_bytes``. ``nll`` is the mean loss per token in nats,
      for log-likelihood tasks; a metric that two tasks have is ``TASK.METRIC``;
    - ``stderr``: name -> metric -> standard error over the rows;
    - ``metrics``: name -> ``task``, ``higher_is_better``;
    - ``tasks``: name -> ``output_type``, ``rows``;

    ``table.md``, and ``samples.jsonl``, a few rows that each system generated.

    Raises:
        EmlocError: systems, tasks, data or the output directory are wrong; names which.
    """

    def __init__(self, request: EvaluateRequest) -> None:
        self.request = request
        _check_names(request.systems)
        self._specs = _specs(request.tasks, Inputs())  # nothing is written, not even hashes beside the output
        bundled = [spec.name for spec in self._specs if spec.path is None]
        if bundled and not (request.output / MANIFEST).is_file():
            require_bundled(bundled)
        self.systems = [
            _Opened(system.name, open_checkpoint(system.model), system.adapter) for system in request.systems
        ]
        _check(self.systems, self._specs)

    @cached_property
    def output(self) -> Output:
        """The comparison's output. Computed once: it hashes the files of all systems."""
        from emloc_core.model.device import choose_device

        request, files = self.request, Inputs(self.request.output.resolve().parent)
        _check_adapters(self.systems, files)
        content = _content(self.systems, _specs(request.tasks, files), files)
        return Output(request.output, "evaluation", {**content, **self._settings}, choose_device().type, files=files)

    @property
    def _settings(self) -> dict[str, Any]:
        return self.request.model_dump(include={"limit", "batch_size", "chat", "seed"})

    def describe(self) -> dict[str, Any]:
        """Return which systems would be compared on which tasks."""
        _check_adapters(self.systems, Inputs())
        return {
            "systems": {
                system.name: {
                    "model": str(system.model.directory),
                    "adapter": str(system.adapter) if system.adapter else None,
                }
                for system in self.systems
            },
            "tasks": {spec.name: str(spec.path or "lm-eval") for spec in self._specs},
        }

    def make(self, staging: Path, progress: Progress) -> None:
        """Evaluate the systems, each in its own process; ``progress`` is called with a system's name."""
        systems = self.systems
        parts = {}
        for number, system in enumerate(systems):
            result = staging / f".{system.name}.json"
            progress(system.name, number, len(systems))
            if not result.exists():
                write_json(result, self._evaluate(system, staging))
            parts[system.name] = read_json(result)
        progress("", len(systems), len(systems))
        results = _combine(parts)
        _publish(staging, results, parts)
        self.output.result = {
            name: {metric: value for metric, value in row.items() if metric not in COSTS}
            for name, row in results["systems"].items()
        }
        self.output.timing["systems"] = {
            name: {cost: row[cost] for cost in COSTS} for name, row in results["systems"].items()
        }

    def _evaluate(self, system: _Opened, staging: Path) -> dict[str, Any]:
        log = staging / f".{system.name}.log"
        arguments = {
            "model": str(system.model.directory.resolve()),
            "adapter": str(system.adapter.resolve()) if system.adapter else None,
            "tasks": [{"name": spec.name, "path": str(spec.path) if spec.path else None} for spec in self._specs],
            "settings": self._settings,
        }
        try:
            (result,) = call("emloc_core.evaluation.system:evaluate_system", arguments, log=log)
        except ProcessDiedError as error:
            lines = log.read_text("utf-8", errors="replace").strip().splitlines()
            died = f"it was killed by signal {-error.exit_code}, as when memory runs out"
            reason = died if error.exit_code < 0 else (lines or ["no output"])[-1]
            raise EmlocError(
                f"Evaluating the system {system.name} failed: {reason} (log: {log}).",
                "Run the same command again: finished systems are kept.",
                code="died",
                resumable=True,
            ) from None
        except EmlocError as error:
            done = any(staging.glob(".*.json"))  # keep the other systems' results
            raise EmlocError(
                f"The system {system.name} cannot be evaluated: {error}", code=error.code, resumable=done
            ) from None
        log.unlink(missing_ok=True)
        return result


def _specs(tasks: Sequence[str], files: Inputs) -> list[TaskSpec]:
    if not tasks:
        raise EmlocError("There is no task to evaluate on.", "Give a task file; `emloc eval --new-task` writes one.")
    specs = [find_task(task, files) for task in tasks]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise EmlocError(f"Two tasks are called {name!r}.", "Give each its own `task:` name.")
    return specs


def _check_names(systems: Sequence[System]) -> None:
    if not systems:
        raise EmlocError("There is no system to evaluate.", "Give --base, --emulator or --system NAME=MODEL.")
    names = [system.name for system in systems]
    for system in systems:
        if not _NAME.fullmatch(system.name):
            raise EmlocError(f"{system.name!r} is not a name for a system.", "Use letters, digits and + . _ - in it.")
        if names.count(system.name) > 1:
            raise EmlocError(f"Two systems are called {system.name!r}.", "Give each its own name.")


def _check(systems: Sequence[_Opened], specs: Sequence[TaskSpec]) -> None:
    image_task = next((spec.name for spec in specs if spec.shows_images), None)
    for system in systems:
        model = system.model.directory
        if (command := system.model.objective.scored_by) != "eval":
            raise EmlocError(
                f"lm-eval has no tasks for {model} ({system.name}), which does not write text.",
                f"Score it by `emloc {command} {model}`: see `emloc {command} --help`.",
                code="unsupported",
            )
        family = plugin_manager().family_for(system.model.config)
        if image_task and family.modality == "text":
            raise EmlocError(
                f"The task {image_task} shows images, and {model} ({system.name}) is of the family "
                f"{family.name}, which only reads text.",
                "Give a model for images and text, or another task.",
                code="mismatch",
            )
        if system.adapter:
            require_lora(system.adapter)


def _content(systems: Sequence[_Opened], specs: Sequence[TaskSpec], files: Inputs) -> dict[str, Any]:
    from emloc_core.adapters.adapter import fingerprint

    described = {
        system.name: {
            "model": system.model.fingerprint(files),
            "adapter": fingerprint(system.adapter, files) if system.adapter else None,
        }
        for system in systems
    }
    return {"systems": described, "tasks": {spec.name: spec.digest for spec in specs}, "lm-eval": version("lm-eval")}


def _combine(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the systems' results, with one name per metric."""
    first = next(iter(parts.values()))["tasks"]
    owners: dict[str, list[str]] = {}
    for task, scored in first.items():
        for metric in scored["metrics"]:
            owners.setdefault(metric, []).append(task)
    metrics, systems, stderr = {}, {}, {}
    for name, part in parts.items():
        row, errors = {}, {}
        for task, scored in part["tasks"].items():
            for metric, value in scored["metrics"].items():
                label = metric if len(owners[metric]) == 1 else f"{task}.{metric}"
                metrics[label] = {"task": task, "higher_is_better": value["higher_is_better"]}
                row[label], errors[label] = value["value"], value["stderr"]
        systems[name] = {**row, "seconds": part["seconds"], "peak_bytes": part["peak_bytes"]}
        stderr[name] = errors
    tasks = {name: {key: scored[key] for key in ("output_type", "rows")} for name, scored in first.items()}
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


def read_results(output: Path, order: Sequence[str] = ORDER) -> dict[str, Any]:
    """Return a comparison's ``results.json``, with the systems in this order, which the file does not keep."""
    results = read_json(output / RESULTS)
    names = [*(name for name in order if name in results["systems"]), *sorted(set(results["systems"]) - set(order))]
    return {**results, "systems": {name: results["systems"][name] for name in names}}
