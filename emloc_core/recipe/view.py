"""A run, ready to be shown: what each stage did, its losses and memory, the corrections compared, the scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json, read_object
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.meter import peak_memory
from emloc_core.files.output import TIMING
from emloc_core.recipe.answers import FILE as ANSWERS
from emloc_core.recipe.planned import planned_bytes
from emloc_core.recipe.recipe import ROUND
from emloc_core.report.chart import Line
from emloc_core.report.error_plot import Strip, finite, strips
from emloc_core.report.table import rows as table_rows
from emloc_core.report.verdict import verdict

#: What the stages of a recipe do, by the directories that they write.
PURPOSES = {
    "emulator": "emulator made",
    "adapter": "LoRA tuned",
    "corrected": "carried over to the base",
    "polished": "exact steps on the base",
    "merged": "merged into the base",
    "full_lora": "control: LoRA tuned on the base",
    "exact_alone": "control: exact steps alone",
    "evaluation": "all compared",
}
#: The losses in a log, and the rows that they are for.
LOSSES = {"loss": "rows of the step", "eval_loss": "held-out rows", "eval_base_loss": "held-out rows, on the base"}
#: The versions that are shown, and the kind of device.
_VERSIONS = ("emloc", "python", "torch", "transformers", "peft", "trl", "device")
#: Standard errors in half of a 95 % interval.
_HALF = 1.96


@dataclass(frozen=True)
class StageView:
    """One stage that is finished.

    Attributes:
        log: entries of tuning with a step, and losses or a margin.
        planned: bytes according to the memory plan; None without one.
    """

    name: str
    manifest: Mapping[str, Any]
    timing: Mapping[str, Any]
    log: list[dict[str, Any]]
    planned: int | None = None

    @property
    def purpose(self) -> str:
        """What it did."""
        purposes = (text for name, text in PURPOSES.items() if self.name == name or self.name.startswith(f"{name}_"))
        return next(purposes, self.name)

    @property
    def settings(self) -> list[tuple[str, Any]]:
        """Its settings, by name."""
        settings = self.manifest.get("request", {}).get("settings", {})
        return [(name, value) for name, value in settings.items() if value not in (None, {}, [])]

    @property
    def losses(self) -> list[Line]:
        """The losses of tuning: on the rows of each step, and of evaluations."""
        return [
            line for key, name in LOSSES.items() if (line := Line(name, self._logged(key), marked=key != "loss")).points
        ]

    @property
    def unit(self) -> str:
        """The unit of its losses: nats per token for answers; other objectives have none."""
        return "nats per token" if dict(self.settings).get("objective", "sft") == "sft" else "loss"

    @property
    def margins(self) -> list[Line]:
        """By how much the reward of chosen answers exceeds that of rejected ones, if preferences were learned."""
        points = self._logged("rewards/margins")
        return [Line("margin", points)] if points else []

    def _logged(self, key: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[key]) for entry in self.log if isinstance(entry.get(key), int | float)]

    @property
    def peak(self) -> int | None:
        """Its peak memory: of the GPU, or of the process."""
        return peak_memory(self.timing)


@dataclass(frozen=True)
class RunView:
    """A finished run, ready to be shown.

    Attributes:
        stages: the finished stages, in order.
        results: the content of ``results.json``; empty without one.
        answers: answers to a few held-out rows, before and after tuning.
    """

    name: str
    stages: list[StageView]
    results: Mapping[str, Any]
    answers: list[Mapping[str, str]]

    @classmethod
    def read(cls, run: Path) -> "RunView":
        """Read the directory that ``emloc run`` wrote to.

        Raises:
            EmlocError: there is no such directory, or no stage is finished there.
        """
        if not run.is_dir():
            raise EmlocError(f"{run} is not a directory.", "Give the output directory of `emloc run`.", code="missing")
        paths = sorted(run.iterdir(), key=_order)
        finished = {
            path.name: path for path in paths if _order(path)[1] < len(PURPOSES) and (path / MANIFEST).is_file()
        }
        if not finished:
            raise EmlocError(
                f"{run} holds no finished stage of a run.", "Give the output directory of `emloc run`.", code="missing"
            )
        results = _read(run / "results.json")
        endings = [name.removeprefix("emulator") for name in finished if name.startswith("emulator")] or [""]
        planned = {name: size for end in endings for name, size in planned_bytes(finished, end).items()}
        stages = [
            StageView(name, read_object(path / MANIFEST), _read(path / TIMING), _log(path), planned.get(name))
            for name, path in finished.items()
        ]
        return cls(run.resolve().name, stages, results, _read(run / ANSWERS).get("answers", []))

    def stage(self, name: str) -> StageView | None:
        """Return a stage by the name of its directory."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def seconds(self) -> float:
        """Time of all stages."""
        return sum(stage.timing.get("seconds", 0) for stage in self.stages)

    @property
    def bytes(self) -> tuple[int, int] | None:
        """Bytes of the base and of the emulator."""
        sizes = self._result("emulator").get("bytes")
        return (sizes["base"], sizes["emulator"]) if sizes else None

    @property
    def errors(self) -> list[Strip]:
        """The error of every Linear of the emulator."""
        linears = self._result("emulator").get("linears", [])
        return strips({linear["path"]: linear.get("relative_error") for linear in linears})

    @property
    def top_error(self) -> float:
        """The largest of these errors."""
        return max((value for strip in self.errors for value in finite(strip.values)), default=0)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Base, data, emulator, LoRA, device and versions of the run, as far as the files say."""
        emulator, adapter = (self._manifest(name) for name in ("emulator", "adapter"))
        inputs, settings = emulator.get("inputs", {}), emulator.get("request", {}).get("settings", {})
        lora, tuned = adapter.get("request", {}).get("settings", {}), adapter.get("inputs", {})
        targets = ", ".join(map(str, adapter.get("result", {}).get("target_modules", [])))
        ratio = f", ratio {settings['ratio']:g}" if isinstance(settings.get("ratio"), int | float) else ""
        used = [stage.manifest.get("versions", {}) for stage in self.stages]
        versions = {
            name: list(dict.fromkeys(str(packages[name]) for packages in used if name in packages))
            for name in _VERSIONS
        }
        facts = {
            "base": _name(inputs.get("base") or tuned.get("model", "")),
            "data": _name(tuned.get("data") or inputs.get("data", "")),
            "emulator": f"{settings['kind']}{ratio}" if settings.get("kind") else "",
            "LoRA": f"rank {lora['lora_rank']}" + (f" on {targets}" if targets else "")
            if lora.get("lora_rank")
            else "",
            "versions": ", ".join(f"{name} {' and '.join(values)}" for name, values in versions.items() if values),
        }
        return [(name, value) for name, value in facts.items() if value]

    @property
    def verdict(self) -> str:
        """The outcome of the correction; empty without one."""
        result = self._result("corrected")
        return verdict(result) if "clamp" in result else ""

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """The candidates that the correction compared, each with whether it was chosen."""
        result = self._result("corrected")
        chosen = result.get("clamp"), result.get("scale", 1)
        compared = [{"scale": 1, **candidate} for candidate in result.get("candidates", [])]
        return [{**candidate, "chosen": (candidate["clamp"], candidate["scale"]) == chosen} for candidate in compared]

    @property
    def scores(self) -> list[dict[str, Any]]:
        """A row for every system: its name, and by metric the value, half of its interval, and whether it is best."""
        systems = self.results.get("systems", {})
        spreads = self.results.get("stderr", {})
        rows = []
        for row in table_rows(systems, self.results.get("metrics")) if systems else []:
            cells = {}
            for metric in self.metrics:
                spread = spreads.get(row["system"], {}).get(metric)
                half = _HALF * spread if isinstance(spread, int | float) else None
                cells[metric] = row[metric], half, metric in row["best"]
            rows.append({"system": row["system"], "cells": cells})
        return rows

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics."""
        return sorted(self.results.get("metrics", {}), key=lambda name: (not name.endswith("nll"), name))

    def _manifest(self, name: str) -> Mapping[str, Any]:
        stage = self.stage(name)
        return stage.manifest if stage else {}

    def _result(self, name: str) -> Mapping[str, Any]:
        return self._manifest(name).get("result", {})


def _order(path: Path) -> tuple[float, int, str]:
    """Return a key that sorts the stages' directories: by round, the last of which has no number, then by stage."""
    number = ROUND.search(path.name)
    stages = (index for index, name in enumerate(PURPOSES) if path.name == name or path.name.startswith(f"{name}_"))
    return int(number[1]) if number else float("inf"), next(stages, len(PURPOSES)), path.name


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _log(stage: Path) -> list[dict[str, Any]]:
    return read_json(stage / "log.json") if (stage / "log.json").is_file() else []


def _name(name: str) -> str:
    """Return a hub id, or the last part of a path, since pages are made to be sent."""
    return Path(name).name if Path(name).is_absolute() else name
