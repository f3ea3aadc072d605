"""The decision how to tune a model in a memory: ``plan`` shows it, and every other command carries it out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_core.devices import is_accelerator
from emloc_core.errors import EmlocError
from emloc_core.memory.budget import Budget, advice
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.speed import Speed
from emloc_core.memory.ways import EMULATOR, EXACT, ORDINARY, POLISHED, Way, ways
from emloc_core.memory.workload import Workload, make_workload
from emloc_core.requests import CompressRequest
from emloc_core.settings import AUTO, CompressSettings
from emloc_core.units import counted, human_bytes

if TYPE_CHECKING:
    from emloc_core.emulator.compress import Compress

_STEPS = {
    ORDINARY: "train an ordinary LoRA on the model",
    EMULATOR: "make the emulator, train a LoRA on it, and correct it for the model",
    POLISHED: "make the emulator, train a LoRA on it, correct it for the model, and take a few exact steps on that",
    EXACT: "train a LoRA by exact steps, which read the model block by block",
}


@dataclass(frozen=True)
class Decision:
    """How to tune a model in a memory.

    Attributes:
        base: the model's memory, with the rows of a step as they were asked for.
        ways: the ways to tune on these rows, in order of preference; an emulator of a kind that was named comes first.
    """

    budget: Budget
    base: MemoryModel
    ways: Sequence[Way]

    @property
    def way(self) -> Way | None:
        """The way to tune: the first that fits; None where none does."""
        return next((way for way in self.ways if way.fits), None)

    @property
    def emulator(self) -> Way | None:
        """The best way with an emulator that fits, whether one is needed or not."""
        return next((way for way in self.ways if way.kind and way.fits), None)

    def best(self, key: str | None) -> Way:
        """Return the best way with this key that fits; by default, with any.

        Raises:
            EmlocError: none fits; the message says what would.
        """
        candidates = [way for way in self.ways if key in (None, way.key)]
        if fitting := next((way for way in candidates if way.fits), None):
            return fitting
        if key is None:
            raise no_way(self.budget, self.advice())
        if key == "emulator":
            return self.require_emulator()
        if not candidates:
            raise EmlocError(f"The model cannot be tuned by the way {key!r}.", "Leave `way` out.", code="unsupported")
        raise EmlocError(
            f"{candidates[0]}, needs {human_bytes(candidates[0].bytes)}, which does not fit {self.budget}.",
            "Leave `way` out, or give more memory.",
            code="memory",
        )

    def explain(self, chosen: Way) -> list[str]:
        """Return in three lines what will be done, and why."""
        workload, before = self.base.workload, self.ways[: self.ways.index(chosen)]
        reasons = [f"{way.name}{f' ({way.kind})' if way.kind else ''} needs {human_bytes(way.bytes)}" for way in before]
        rows = counted(workload.rows_per_step, "row")
        return [
            f"memory: {self.budget}; {rows} of up to {workload.length} tokens per step",
            f"way: {chosen}: {human_bytes(chosen.bytes)}{'; ' if reasons else ''}{', '.join(reasons)}",
            f"so: {_STEPS[chosen.name]}",
        ]

    @property
    def shown(self) -> Way:
        """The way; where none fits, the emulator that was named, or else the way that needs least."""
        first = self.ways[0]
        return self.way or (first if first.kind else min(self.ways, key=lambda way: way.bytes))

    def require_emulator(self) -> Way:
        """Return the way with an emulator.

        Raises:
            EmlocError: none fits; the message says what would.
        """
        if self.base.packed:
            raise _no_emulator()
        if self.emulator is None:
            exact = "exact steps fit (emloc train MODEL --exact)" if self.way and self.way.name == EXACT else ""
            advised = "; ".join(filter(None, [exact, *self.advice()]))
            raise EmlocError(f"No emulator's tuning fits {self.budget}: {advised}.", code="memory")
        return self.emulator

    def advice(self) -> list[str]:
        """Return what would fit where no emulator does, or the base itself, if that is in four bits."""
        smallest = min((way for way in self.ways if way.kind or self.base.packed), key=lambda way: way.bytes)
        return list(advice(smallest.model, self.budget.usable))


def decide(
    config: Path,
    workload: Workload,
    budget: Budget | None = None,
    settings: CompressSettings | None = None,
    speed: Speed | None = None,
) -> Decision:
    """Decide how to tune a model: the way, the kind of emulator and its ratio, and how many rows at once.

    Args:
        workload: the rows of an optimiser step, and how they are trained on.
        budget: the memory; None: what inference on the base needs with as many rows.
        settings: how an emulator is made. With the kind ``auto``, which is the default here, the recommended kinds are
            compared; with a ratio, that one is planned instead of the largest that fits.
        speed: of the machine, for the time of a step.

    Raises:
        EmlocError: the model cannot be planned, or takes no such settings.
    """
    settings = settings or CompressSettings()
    kinds = (settings.kind,) if settings.kind != AUTO else workload.recommended_kinds
    usual = CompressSettings(kind=kinds[0], keep=settings.keep)
    model = MemoryModel(config, workload, usual if settings.kind == AUTO else settings)
    if model.packed:
        if settings.kind != AUTO:
            raise _no_emulator()
        kinds = ()
    elif settings.ratio is not None:
        model.format.check(settings)
    budget = budget or Budget(model.inference().total, requested=False)
    candidates = ways(model, kinds, budget.usable, settings.ratio, speed)
    if settings.kind != AUTO:
        candidates.sort(key=lambda way: way.kind is None)
    return Decision(budget, model, candidates)


def _no_emulator() -> EmlocError:
    """Return the error for an emulator of a base in four bits."""
    return EmlocError(
        "The model is in four bits, but emulators are made from originals.",
        "Tune a LoRA on it as it is (emloc train), or give the original.",
        code="unsupported",
    )


def no_way(budget: Budget, advised: Sequence[str]) -> EmlocError:
    """Return the error for a memory that no way to tune fits."""
    return EmlocError(f"No way to tune fits {budget}: {'; '.join(advised)}.", code="memory")


def decision_for(request: CompressRequest) -> Decision:
    """Decide how to tune the model of a request in its memory, by the longest row of its data.

    Raises:
        EmlocError: the model cannot be planned, or the request has no memory.
    """
    from emloc_core.files.checkpoint import open_checkpoint

    assert request.memory is not None
    budget = Budget.parse(request.memory, request.headroom, request.tuned_on)
    config = open_checkpoint(request.model).directory / "config.json"
    length = request.settings.max_length or request.tuning.max_length
    rows: dict[str, Any] = {"length": length, "data": request.data, "split": request.split, "columns": request.columns}
    rows["skip_bad_rows"] = request.skip_bad_rows
    workload = make_workload(config, request.tuning, request.tuned_on, **rows)
    return decide(config, workload, budget, request.settings)


def fitted(request: CompressRequest) -> CompressRequest:
    """Return the request with the emulator that was decided on for its memory, and how that is tuned.

    Raises:
        EmlocError: no emulator's tuning fits (the message says what would fit), or the model cannot be planned.
    """
    if request.memory is None:
        return request
    decision = decision_for(request)
    way = decision.require_emulator()
    length = way.model.workload.length
    click.echo(f"{way} of {length} tokens: {human_bytes(way.bytes)}, of {decision.budget}", err=True)
    if plain := next((other for other in decision.ways if other.name == ORDINARY and other.fits), None):
        click.echo(
            f"note: an ordinary LoRA on the model itself fits too ({human_bytes(plain.bytes)}): `emloc train "
            f"{request.model} --batch-size {plain.micro_batch} --accumulation {plain.accumulation}`, with these rows "
            "and settings",
            err=True,
        )
    if request.device != "cpu" and (warning := too_large_to_make(way, decision.budget)):
        click.echo(f"warning: {warning}", err=True)
    settings = request.settings.model_copy(update=way.emulator_settings)
    tuning = request.tuning.model_copy(update=way.step_settings)
    return request.model_copy(update={"memory": None, "headroom": None, "settings": settings, "tuning": tuning})


def prepare(request: CompressRequest) -> "Compress":
    """Return the job of a request, with the emulator that is decided on where it has a memory."""
    from emloc_core.emulator.compress import Compress

    return Compress(fitted(request))


def too_large_to_make(way: Way, budget: Budget) -> str | None:
    """Return a warning where stage 1 needs more than the memory for tuning; None where it does not."""
    if way.compress_bytes <= budget.usable:
        return None
    where = ": run it with --device cpu, in the machine's memory" if is_accelerator(way.model.workload.device) else ""
    return f"making the emulator (compress) needs {human_bytes(way.compress_bytes)}, more than the memory{where}"
