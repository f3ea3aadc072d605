"""One job in the report: figures from the store, and the end of the log if the job failed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from emloc_core.files.meter import peak_memory
from emloc_core.report.error_plot import Strip, finite, strips
from emloc_core.report.table import COSTS, rows
from emloc_core.zoo.jobs.task import Demand
from emloc_core.zoo.report.log_end import log_end
from emloc_core.zoo.state.record import Attempt, JobRecord

#: States, the most urgent first, with what they mean.
STATES = {
    "failed": "failed; see cause and log",
    "interrupted": "was running when its driver ended; the same command resumes it",
    "running": "running now",
    "waiting": "not started, or to be retried",
    "done": "done",
    "duplicate": "the same as another job, so not repeated",
}


@dataclass(frozen=True)
class Peak:
    """A peak of memory.

    Attributes:
        of: what needs it; the name is the key in ``report.json``.
        short: the same in a word.
        planned: whether it comes from the memory plan instead of a measurement.
    """

    of: str
    short: str
    bytes: int | None
    planned: bool = False


@dataclass(frozen=True)
class JobView:
    """One job, ready to be shown.

    Attributes:
        number: from 1, in the store's order; names the job's place in the page.
    """

    record: JobRecord
    directory: Path
    number: int

    @property
    def name(self) -> str:
        """The job's name in the zoo."""
        return self.record.job.name

    @property
    def state(self) -> str:
        """One of ``STATES``."""
        return self.record.state

    @property
    def result(self) -> Mapping[str, Any]:
        """What a finished job reports; empty for others."""
        return self.record.result

    @property
    def kind(self) -> str:
        """The kind of emulator."""
        return str(self.result.get("kind", self.record.job.compress.kind))

    @property
    def losses(self) -> dict[str, float]:
        """The loss per token, if known: the mean of tuning, and the base's on the held-out rows."""
        losses = {"tuning": self.result.get("loss"), "base": self.result.get("correction", {}).get("nll")}
        return {name: loss for name, loss in losses.items() if loss is not None}

    @property
    def ratio(self) -> float | None:
        """The emulator's ratio; for an unfinished job, the requested one. None if there is none."""
        return self.result.get("ratio", self.record.job.compress.ratio)

    @cached_property
    def sizes(self) -> tuple[int | None, int | None]:
        """Bytes of the base's weights and of the emulator's: measured, or else planned."""
        needs = self.record.needs
        measured = self.result.get("bytes") or {}
        planned = (needs.base, needs.emulator) if needs else (None, None)
        return measured.get("base", planned[0]), measured.get("emulator", planned[1])

    @property
    def sizes_are_planned(self) -> bool:
        """Whether :attr:`sizes` are the plan's."""
        return not self.result.get("bytes")

    @property
    def family(self) -> str | None:
        """The model's family; None if the job is not done."""
        return self.result.get("family")

    @cached_property
    def strips(self) -> list[Strip]:
        """The errors of all Linears by tower and kind, without towers that stayed dense."""
        every = strips({str(linear["path"]): linear.get("relative_error") for linear in self.result.get("linears", ())})
        compressed = {strip.tower for strip in every if any(value is not None for value in strip.values)}
        return [strip for strip in every if strip.tower in compressed]

    @property
    def towers(self) -> dict[str, list[Strip]]:
        """The strips by tower, in order, without towers that stayed dense."""
        towers: dict[str, list[Strip]] = {}
        for strip in self.strips:
            towers.setdefault(strip.tower, []).append(strip)
        return towers

    @cached_property
    def dense(self) -> list[str]:
        """The towers whose Linears all stayed dense, for example because no calibration row reached them."""
        paths = [str(linear["path"]) for linear in self.result.get("linears", ())]
        towers = dict.fromkeys(strip.tower for strip in strips(dict.fromkeys(paths)))
        return [tower for tower in towers if tower not in self.towers]

    @cached_property
    def errors(self) -> dict[str, Any]:
        """Relative output errors of the Linears: ``median``, ``worst`` and its ``path``, how many ``not_finite``."""
        errors = {
            str(linear["path"]): linear["relative_error"]
            for linear in self.result.get("linears", ())
            if linear.get("relative_error") is not None
        }
        numbers = {path: value for path, value in errors.items() if math.isfinite(value)}
        worst = max(numbers, key=lambda path: numbers[path], default=None)
        return {
            "median": median(numbers.values()) if numbers else None,
            "worst": numbers[worst] if worst else None,
            "path": worst,
            "not_finite": len(errors) - len(numbers),
        }

    @property
    def top(self) -> float:
        """The largest error that a plot of this job shows."""
        return max((max(finite(strip.values), default=0) for strip in self.strips), default=0)

    @cached_property
    def memory(self) -> list[Peak]:
        """What the base needs when it is used, and the emulator when it is made and tuned, as far as it is known.

        A measured peak is the GPU's if the stage ran on one, otherwise the process's.
        """
        needs = self.record.needs or Demand()
        base = self.result.get("systems", {}).get("base", {}).get("peak_bytes")
        making, tuning = (self.stages.get(name, {}).get("peak_bytes") for name in ("emulator", "adapter"))
        peaks = [
            Peak("evaluating the base", "base", base) if base else
            Peak("inference on the base", "base", needs.inference, planned=True),
            Peak("making the emulator", "making", making),
            Peak("LoRA on the emulator", "tuning", tuning or needs.tuning, planned=not tuning),
        ]  # fmt: skip
        return [peak for peak in peaks if peak.bytes]

    @property
    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        """``seconds`` and ``peak_bytes`` of every stage that is done, in order."""
        timings = self.result.get("stages") or {}
        ordered = [stage.name for stage in self.record.job.stages(Path()) if stage.name in timings]
        return {
            name: {"seconds": timings[name].get("seconds"), "peak_bytes": peak_memory(timings[name])}
            for name in ordered
        }

    @property
    def seconds(self) -> float | None:
        """Time of all attempts in seconds; None if there were none."""
        times = [attempt.seconds for attempt in self.record.attempts if attempt.seconds is not None]
        return sum(times) if times else None

    @cached_property
    def scores(self) -> list[dict[str, Any]]:
        """The comparison of systems as in :func:`emloc_core.report.table.rows`; empty without an evaluation."""
        systems = self.result.get("systems") or {}
        return rows(systems, self.result.get("metrics")) if systems else []

    @property
    def metrics(self) -> list[str]:
        """The columns of :attr:`scores`."""
        return [column for column in (self.scores or [{}])[0] if column not in ("system", "best", *COSTS)]

    @property
    def headline(self) -> tuple[str, Any, Any] | None:
        """The first metric, its value for the base and for the final system; None if one is not known."""
        values = {row["system"]: row for row in self.scores}
        final = next((name for name in ("base+polished", "base+corrected") if name in values), None)
        if not self.metrics or final is None or "base" not in values:
            return None
        metric = self.metrics[0]
        return metric, values["base"][metric], values[final][metric]

    @property
    def failure(self) -> Attempt | None:
        """The last attempt that failed, if the job is not done."""
        failed = [attempt for attempt in self.record.attempts if attempt.cause]
        return failed[-1] if failed and self.state != "done" else None

    @cached_property
    def log_end(self) -> str | None:
        """The end of the last attempt's log, unless it is known to have ended well."""
        if not self.record.attempts or self.state in ("done", "duplicate"):
            return None
        return log_end(self.directory, self.record.attempts[-1].log)

    def to_dict(self) -> dict[str, Any]:
        """Return the record with what is derived from it, for JSON."""
        return {
            **self.record.to_dict(),
            "kind": self.kind,
            "losses": self.losses,
            "errors": self.errors,
            "memory": self.memory,
            "seconds": self.seconds,
            "log_end": self.log_end,
        }


@dataclass(frozen=True)
class Summary:
    """Figures for all jobs together; sums are over the jobs that are done."""

    jobs: int
    states: dict[str, int]
    base_bytes: int
    emulator_bytes: int
    seconds: float
    median_error: float | None
    largest_error: float

    @classmethod
    def from_views(cls, views: list[JobView]) -> "Summary":
        """Sum up the jobs."""
        done = [view for view in views if view.state == "done" and all(view.sizes)]
        medians = finite(view.errors["median"] for view in views)
        counts = {state: sum(view.state == state for view in views) for state in STATES}
        return cls(
            jobs=len(views),
            states={state: count for state, count in counts.items() if count},
            base_bytes=sum(view.sizes[0] or 0 for view in done),
            emulator_bytes=sum(view.sizes[1] or 0 for view in done),
            seconds=sum(view.seconds or 0 for view in views),
            median_error=median(medians) if medians else None,
            largest_error=max((view.top for view in views), default=0),
        )


def share(part: float | None, total: float | None) -> str:
    """Return a share as a percentage; empty if either is not known."""
    return f"{part / total:.0%}" if part is not None and total else ""


def number(value: Any) -> str:
    """Return a figure with three or four digits, ``NaN`` in words, and ``-`` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def score(value: Any) -> str:
    """Return a score with four digits, as :func:`number` does."""
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else number(value)
