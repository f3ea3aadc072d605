"""The page of a run: what was done, memory planned and measured, losses, errors, corrections compared, scores.

One file that asks for no other, in the look of a zoo's report: styles and plots are in it, it has no script, and its
content security policy forbids everything else. All that comes from files is escaped.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core import __version__
from emloc_core.errors import EmlocError, printable
from emloc_core.files.documents import read_json, write_text
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.meter import peak_memory
from emloc_core.files.output import TIMING
from emloc_core.recipe.answers import FILE as ANSWERS
from emloc_core.recipe.live import Doing, doing
from emloc_core.recipe.recipe import FIRST
from emloc_core.recipe.stages import suffix
from emloc_core.report.chart import Line, chart
from emloc_core.report.error_plot import Strip, finite, sparkline, strips
from emloc_core.report.pages import environment
from emloc_core.report.table import rows as table_rows
from emloc_core.report.verdict import verdict
from emloc_core.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from emloc_core.memory.model import MemoryModel

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
#: Seconds after which the page of a run that lasts asks for itself again.
REFRESH = 3
#: The losses in a log, and what they are of.
LOSSES = {"loss": "rows of the step", "eval_loss": "held-out rows", "eval_base_loss": "held-out rows, on the base"}
#: Whose versions are shown, and the kind of device.
_VERSIONS = ("emloc", "python", "torch", "transformers", "peft", "trl", "device")
#: Standard errors in half of a 95 % interval.
_HALF = 1.96


@dataclass(frozen=True)
class StageView:
    """One stage that is finished.

    Attributes:
        name: of its directory.
        manifest: the content of ``emloc.json``.
        timing: that of ``timing.json``.
        log: of tuning: entries with a step, and losses or a margin.
        planned: bytes by the memory plan; None where there is none.
    """

    name: str
    manifest: Mapping[str, Any]
    timing: Mapping[str, Any]
    log: list[dict[str, Any]]
    planned: int | None = None

    @property
    def purpose(self) -> str:
        """What it did."""
        known = (text for name, text in PURPOSES.items() if self.name == name or self.name.startswith(f"{name}_"))
        return next(known, self.name)

    @property
    def settings(self) -> list[tuple[str, Any]]:
        """The settings that it had, by name."""
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
        """What its losses are in: those of answers in nats per token, others in units of their own."""
        return "nats per token" if dict(self.settings).get("objective", "sft") == "sft" else "loss"

    @property
    def margins(self) -> list[Line]:
        """By how much the reward of chosen answers exceeds that of rejected ones, where preferences were learned."""
        points = self._logged("rewards/margins")
        return [Line("margin", points)] if points else []

    def _logged(self, key: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[key]) for entry in self.log if isinstance(entry.get(key), int | float)]

    @property
    def peak(self) -> int | None:
        """The memory that it took: of the GPU, or of the process."""
        return peak_memory(self.timing)


@dataclass(frozen=True)
class RunView:
    """A finished run, ready to be shown.

    Attributes:
        name: of its directory.
        stages: those that are finished, in order.
        results: the content of ``results.json``; empty without one.
        answers: to a few held-out rows, before tuning and after it.
    """

    name: str
    stages: list[StageView]
    results: Mapping[str, Any]
    answers: list[Mapping[str, str]]

    @classmethod
    def read(cls, run: Path, *, whole: bool = True) -> "RunView":
        """Read the directory that ``emloc run`` wrote to.

        Args:
            run: the directory.
            whole: plan the memory too, which takes seconds, and refuse a directory without a finished stage.

        Raises:
            EmlocError: no stage is finished there.
        """
        made = sorted(run.iterdir(), key=_order) if run.is_dir() else []
        finished = {path.name: path for path in made if _order(path)[0] < len(PURPOSES) and (path / MANIFEST).is_file()}
        if whole and not finished:
            raise EmlocError(
                f"{run} holds no finished stage of a run.", "Give the output directory of `emloc run`.", code="missing"
            )
        results = _read(run / "results.json")
        tried = results.get("selection_losses", [FIRST])
        # Those of the kept emulator come last: the plans of the base's stages are theirs.
        order = sorted(tried, key=lambda name: name == results.get("kept"))
        planned = {name: size for each in order if whole for name, size in _planned(finished, suffix(each)).items()}
        stages = [
            StageView(name, read_json(path / MANIFEST), _read(path / TIMING), _log(path), planned.get(name))
            for name, path in finished.items()
        ]
        return cls(run.resolve().name, stages, results, _read(run / ANSWERS).get("answers", []))

    @property
    def suffix(self) -> str:
        """What the names of the kept emulator's directories end with."""
        return suffix(self.results.get("kept", FIRST))

    @property
    def selection_losses(self) -> Mapping[str, float]:
        """The loss of the base on the selection rows by emulator, where several were tried."""
        losses: Mapping[str, float] = self.results.get("selection_losses", {})
        return losses

    @property
    def kinds(self) -> Mapping[str, str]:
        """The kind by emulator, where several were tried; nothing of runs of older versions."""
        kinds: Mapping[str, str] = self.results.get("kinds", {})
        return kinds

    def stage(self, name: str) -> StageView | None:
        """Return a stage by the name of its directory."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def seconds(self) -> float:
        """How long all stages took."""
        return sum(stage.timing.get("seconds", 0) for stage in self.stages)

    @property
    def bytes(self) -> tuple[int, int] | None:
        """Bytes of the base and of the emulator."""
        sizes = self._result(f"emulator{self.suffix}").get("bytes")
        return (sizes["base"], sizes["emulator"]) if sizes else None

    @property
    def errors(self) -> list[Strip]:
        """The error of every Linear of the emulator."""
        linears = self._result(f"emulator{self.suffix}").get("linears", [])
        return strips({linear["path"]: linear.get("relative_error") for linear in linears})

    @property
    def top_error(self) -> float:
        """The largest of these."""
        return max((value for strip in self.errors for value in finite(strip.values)), default=0)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the run is of: base, data, emulator, LoRA, device and versions, as far as the files say."""
        emulator, adapter = (self._manifest(f"{name}{self.suffix}") for name in ("emulator", "adapter"))
        inputs, made = emulator.get("inputs", {}), emulator.get("request", {}).get("settings", {})
        lora, tuned = adapter.get("request", {}).get("settings", {}), adapter.get("inputs", {})
        targets = ", ".join(map(str, adapter.get("result", {}).get("target_modules", [])))
        ratio = f", ratio {made['ratio']:g}" if isinstance(made.get("ratio"), int | float) else ""
        used = [stage.manifest.get("versions", {}) for stage in self.stages]
        versions = {name: list(dict.fromkeys(str(each[name]) for each in used if name in each)) for name in _VERSIONS}
        facts = {
            "base": _name(inputs.get("base") or tuned.get("model", "")),
            "data": _name(tuned.get("data") or inputs.get("data", "")),
            "emulator": f"{made['kind']}{ratio}" if made.get("kind") else "",
            "LoRA": f"rank {lora['lora_rank']}" + (f" on {targets}" if targets else "")
            if lora.get("lora_rank")
            else "",
            "versions": ", ".join(f"{name} {' and '.join(each)}" for name, each in versions.items() if each),
        }
        return [(name, value) for name, value in facts.items() if value]

    @property
    def verdict(self) -> str:
        """What the correction came to; empty without one."""
        result = self._result(f"corrected{self.suffix}")
        return verdict(result) if "clamp" in result else ""

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """What the correction compared, each with whether it was chosen."""
        result = self._result(f"corrected{self.suffix}")
        chosen = result.get("clamp"), result.get("scale", 1)
        compared = [{"scale": 1, **each} for each in result.get("candidates", [])]
        return [{**each, "chosen": (each["clamp"], each["scale"]) == chosen} for each in compared]

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
        result: Mapping[str, Any] = self._manifest(name).get("result", {})
        return result


def write_page(run: Path, output: Path) -> Path:
    """Write the page of a run, whole or not at all.

    Raises:
        EmlocError: no stage is finished there, or the page cannot be written.
    """
    write_text(output, _render(RunView.read(run)))
    return output


def live_page(run: Path) -> str:
    """Return the page of a run as it is now, with the stage that runs; it asks for itself again."""
    return _render(RunView.read(run, whole=False), doing(run), REFRESH)


def _render(view: RunView, now: Doing | None = None, refresh: int | None = None) -> str:
    templates = environment(
        "emloc_core.recipe",
        size=lambda count: "-" if count is None else human_bytes(count),
        duration=lambda seconds: "-" if seconds is None else human_seconds(seconds),
        number=_number,
        plain=lambda text: printable(str(text)),
    )
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    template = templates.get_template("run.html.j2")
    drawing = {"sparkline": sparkline, "chart": chart, "line": Line}
    text = template.render(run=view, now=now, refresh=refresh, written=written, version=__version__, **drawing)
    return f"{text.strip()}\n"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return printable(str(value))
    return f"{value:.4g}"


def _order(path: Path) -> tuple[int, str]:
    """Return the place of a stage's directory among the stages."""
    for index, name in enumerate(PURPOSES):
        if path.name == name or path.name.startswith(f"{name}_"):
            return index, path.name
    return len(PURPOSES), path.name


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _log(stage: Path) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = read_json(stage / "log.json") if (stage / "log.json").is_file() else []
    return log


def _name(given: str) -> str:
    """Return a hub id, or the last part of a path, since pages are made to be sent."""
    return Path(given).name if Path(given).is_absolute() else given


def _planned(made: Mapping[str, Path], ending: str) -> dict[str, int]:
    """Return the bytes that the memory plan says for the stages of a LoRA, where the base's config is still there."""
    from emloc_core.memory import streamed

    emulator, adapter, corrected, polished = (
        f"{name}{ending}" for name in ("emulator", "adapter", "corrected", "polished")
    )
    try:
        tuned = read_json(made[adapter] / MANIFEST)
        model = _model(made.get(emulator), made[adapter], tuned)
        peaks = {f"merged{ending}": streamed.merge(model).total, "full_lora": model.tuning().total}
        if polished in made:
            steps = read_json(made[polished] / MANIFEST)["request"]["settings"]
            rows = steps["batch_size"]
            peaks[polished] = streamed.exact(model, rows * steps["accumulation"], rows).total
        if emulator not in made:
            exact = tuned["request"].get("exact", False)
            rows = model.workload.batch_size
            need = streamed.exact(model, at_once=rows) if exact else model.tuning()
            return {**peaks, adapter: need.total}
        plan = model.linears.as_made(read_json(made[emulator] / MANIFEST)["result"]["linears"])
        request = _read(made[corrected] / MANIFEST)["request"] if corrected in made else {}
        return {
            **peaks,
            emulator: streamed.compress(model, plan).total,
            adapter: model.tuning(plan, made=True).total,
            corrected: streamed.correct(model, plan, request.get("clamp")).total,
        }
    except (EmlocError, KeyError, StopIteration, TypeError, ValueError, OSError):  # the page is of use without a plan
        return {}


def _model(emulator: Path | None, adapter: Path, tuned: Mapping[str, Any]) -> "MemoryModel":
    """Return the memory of the base on the rows that were tuned on: the longest, or where there are images, those kept.

    Raises:
        KeyError, StopIteration, OSError: something is missing.
    """
    from emloc_core.data.rows import CALIBRATION, SELECTION
    from emloc_core.files.manifest import made_from
    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import make_workload
    from emloc_core.settings import CompressSettings, TrainSettings

    config = Path(made_from(emulator, "base") if emulator else made_from(adapter, "model")) / "config.json"
    settings = TrainSettings(**tuned["request"]["settings"])
    device = "cuda" if "peak_cuda_bytes" in _read(adapter / TIMING) else "cpu"
    if emulator is None:
        workload = make_workload(config, settings, device, length=tuned["result"]["longest_tokens"])
        if workload.images:
            raise KeyError("images")  # nothing says how many a row has
        return MemoryModel(config, workload)
    kept = (emulator / name for name in (CALIBRATION, SELECTION))
    rows = next(str(path) for path in kept if path.stat().st_size)  # without calibration there are no such rows
    workload = make_workload(config, settings, device, length=settings.max_length, data=rows)
    made = read_json(emulator / MANIFEST)["request"]["settings"]
    return MemoryModel(config, workload, CompressSettings(**made))
