"""Finds the largest ratio whose tuning fits a memory budget, or what would fit instead."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from emloc_core.errors import EmlocError
from emloc_core.memory.evidence import alternative_to
from emloc_core.requests import CompressRequest
from emloc_core.settings import AUTO, CompressSettings
from emloc_core.units import human_bytes, parse_bytes

if TYPE_CHECKING:
    from emloc_core.memory.model import MemoryModel, Need
    from emloc_core.memory.workload import Workload

#: Bytes per parameter in 4 bits with one fp32 scale per 64 parameters (NF4; Dettmers et al., 2023, without double
#: quantisation).
_NF4 = (4 + 32 / 64) / 8


@dataclass(frozen=True)
class Fit:
    """The chosen emulator.

    Attributes:
        ratio: the largest that fits, a multiple of 0.01, and at most the kind's largest.
        need: the memory for tuning it.
    """

    ratio: float
    need: "Need"


def largest_ratio(model: "MemoryModel", budget: int) -> Fit | None:
    """Return the largest multiple of 0.01 whose tuning fits ``budget`` bytes, or None if not even the smallest fits.

    The memory for tuning grows with the ratio, mostly by the weights, which are counted without tracing. So the first
    guess is close, and few steps are traced.

    Args:
        model: the base model's memory.
        budget: bytes.
    """

    def need(hundredths: int) -> "Need":
        return model.tuning(model.plan(hundredths / 100))

    fits, too_large = round(model.kind.smallest_ratio * 100), round(model.kind.largest_ratio * 100) + 1
    if need(fits).total > budget:
        return None
    while too_large - fits > 1:
        room = budget - need(fits).total
        weights = model.weight_bytes(fits / 100)
        guess = next(
            (at for at in range(too_large - 1, fits, -1) if model.weight_bytes(at / 100) - weights <= room), fits + 1
        )
        if need(guess).total <= budget:
            fits = guess
        else:
            too_large = guess
    return Fit(fits / 100, need(fits))


def require_fit(model: "MemoryModel", budget: int) -> Fit:
    """Return the result of :func:`largest_ratio`.

    Raises:
        EmlocError: nothing fits; the message says what would fit.
    """
    fit = largest_ratio(model, budget)
    if fit is None:
        raise no_fit(budget, list(advice(model, budget)))
    return fit


def fitted(request: CompressRequest) -> CompressRequest:
    """Return the request with the kind and the ratio that fit its memory, for its longest row on a GPU.

    Raises:
        EmlocError: no emulator's tuning fits (the message says what would fit), none is needed, the model cannot be
            planned, or a kind is to be chosen for no memory.
    """
    settings = request.settings
    if request.memory is None:
        if settings.kind == AUTO:
            raise EmlocError(
                "The kind 'auto' is chosen by the memory for tuning, which is not given.",
                "Give --memory, such as 24GiB, or another --kind.",
            )
        return request
    from emloc_core.memory import stages

    settings = _with_kind(request)
    budget = parse_bytes(request.memory)
    model = _planned(request, settings, budget)
    workload = model.workload
    if settings.kind == AUTO and (need := model.tuning().total) <= budget:
        raise EmlocError(
            f"An ordinary LoRA on the base needs {human_bytes(need)} of {human_bytes(budget)}: no emulator is needed.",
            "Run `emloc train MODEL`, or choose a --kind.",
        )
    fit = require_fit(model, budget)
    ratio = {"ratio": fit.ratio} if model.kind.has_factors else {}
    what = model.kind.name + (f" at ratio {fit.ratio:g}" if ratio else "")
    click.echo(
        f"{what}: tuning with {workload.batch_size} rows x {workload.length} tokens needs "
        f"{human_bytes(fit.need.total)} of {human_bytes(budget)}",
        err=True,
    )
    if settings.kind == AUTO and (hint := _one_row_hint(model, budget)):
        click.echo(hint, err=True)
    making = stages.compress(model, model.plan(fit.ratio)).total
    if request.device != "cpu" and (warning := too_large_to_make(making, budget, workload.device)):
        click.echo(f"warning: {warning}", err=True)
    settings = settings.model_copy(update={"kind": model.kind.name, **ratio})
    return request.model_copy(update={"memory": None, "settings": settings})


def recommended(request: CompressRequest) -> list[str]:
    """Return the kinds of emulator to try within a request's memory.

    The best on average comes first, then one that fits too and was better on some task, if there is one. There are none
    where no kind is to be chosen, no emulator is needed, or none fits.

    Raises:
        EmlocError: the model cannot be planned.
    """
    settings = _with_kind(request)
    if request.memory is None or settings.kind != AUTO:
        return []
    budget = parse_bytes(request.memory)
    model = _planned(request, settings, budget)
    if model.tuning().total <= budget or (fit := largest_ratio(model, budget)) is None:
        return []
    kinds = [model.kind.name]
    if name := alternative_to(model.kind.name, fit.ratio if model.kind.has_factors else None):
        other = model.with_kind(name)
        if other.kind.is_usable() and largest_ratio(other, budget):
            kinds.append(name)
    return kinds


def _with_kind(request: CompressRequest) -> CompressSettings:
    """Return the settings of a request for a memory: the kind is open where none is named."""
    if "kind" in request.settings.model_fields_set or request.keep_spectra is not None:  # spectra are of factors
        return request.settings
    return request.settings.model_copy(update={"kind": AUTO})


def _planned(request: CompressRequest, settings: CompressSettings, budget: int) -> "MemoryModel":
    """Return the memory of a request's model, for tuning an emulator on the longest row."""
    from emloc_core.files.checkpoint import open_checkpoint
    from emloc_core.memory.workload import make_workload

    config = open_checkpoint(request.model).directory / "config.json"
    length = settings.max_length or request.tuning.max_length
    rows = {"length": length, "data": request.data, "split": request.split, "columns": request.columns}
    workload = make_workload(config, request.tuning, **rows)
    return with_emulator(config, workload, settings, budget)


def too_large_to_make(need: int, budget: int, device: str) -> str | None:
    """Return a warning where stage 1 needs more than the budget; None where it does not.

    Args:
        need: bytes that stage 1 needs.
        budget: bytes for tuning.
        device: that the budget is of: ``cuda`` or ``cpu``.
    """
    if need <= budget:
        return None
    where = ": run it with --device cpu, in the machine's memory" if device == "cuda" else ""
    return f"making the emulator (compress) needs {human_bytes(need)}, more than the memory for tuning{where}"


def with_emulator(config: Path, workload: "Workload", settings: CompressSettings, budget: int | None) -> "MemoryModel":
    """Return the memory of a model with an emulator; of the kind ``auto``, the first recommended kind that fits.

    Args:
        config: the model's ``config.json``.
        workload: the batch, and how it is trained on.
        settings: how the emulator is made.
        budget: bytes that tuning may use; None: what inference on the base needs.
    """
    from emloc_core.memory.model import MemoryModel

    if settings.kind != AUTO:
        return MemoryModel(config, workload, settings)
    base = MemoryModel(config, workload, CompressSettings(kind=workload.recommended_kinds[0]))
    allowed = base.inference().total if budget is None else budget  # traced once, for all kinds
    models = [model for model in map(base.with_kind, workload.recommended_kinds) if model.kind.is_usable()]
    return next((model for model in models if largest_ratio(model, allowed)), models[-1])


def _one_row_hint(model: "MemoryModel", budget: int) -> str | None:
    """Return a line that says what one row at a time would leave room for, if that is better than what was chosen.

    Args:
        model: with the chosen kind of emulator.
        budget: bytes that tuning may use.
    """
    settings = CompressSettings(kind=AUTO)
    if model.workload.batch_size == 1:
        return None
    alone = with_emulator(model.config_file, model.workload.one_row_at_a_time(), settings, budget)
    train = f"--batch-size 1 --accumulation {model.workload.rows_per_step}"
    if alone.tuning().total <= budget:
        return f"With one row at a time an ordinary LoRA on the base fits: emloc train MODEL {train}"
    kinds = model.workload.recommended_kinds
    if kinds.index(alone.kind.name) < kinds.index(model.kind.name):
        return f"With one row at a time {alone.kind.name} fits: compress with --batch-size 1, and train with {train}"
    return None


def no_fit(budget: int, advised: Iterable[str]) -> EmlocError:
    """Return the error for a budget that no emulator's tuning fits."""
    return EmlocError(f"No emulator's tuning fits {human_bytes(budget)}: {'; '.join(advised)}.", code="memory")


def nf4_saving(model: "MemoryModel") -> int:
    """Return the bytes saved by quantising the base's Linears to 4 bits (NF4)."""
    linears = sum(linear.numbers for linear in model.linears.candidates)  # fused experts are no Linears to it
    return int(linears * (model.dtype.itemsize - _NF4))


def advice(model: "MemoryModel", budget: int) -> Iterator[str]:
    """Yield lines that say what would fit when no emulator does; each is computed, not guessed."""

    def sized(ratio: float, how: str) -> str:
        return f" {how} {ratio:g}" if model.kind.has_factors else ""

    workload = model.workload
    ratio = model.kind.smallest_ratio
    smallest = model.tuning(model.plan(ratio)).total
    yield f"tuning the smallest emulator{sized(ratio, 'of ratio')} needs {human_bytes(smallest)}"
    batch, length = workload.batch_size, workload.length
    shortest = max(64, model.least_length())
    found = False
    while batch > 1 or (length > shortest and not found):
        batch, length = (batch // 2, length) if batch > 1 else (1, max(shortest, length // 2))
        fit = largest_ratio(model.with_workload(replace(workload, batch_size=batch, length=length)), budget)
        if fit:
            found = True
            yield f"{batch} x {length} tokens fits{sized(fit.ratio, 'with ratio')} ({human_bytes(fit.need.total)})"
    if not found:
        yield f"no batch size or length fits: even 1 x {length} tokens needs more"
    base = model.with_workload(replace(workload, batch_size=1, length=length)).tuning()
    needed = base.total - nf4_saving(model)
    verdict = "fits" if needed <= budget else "does not fit"
    quantised = "an ordinary LoRA on a base in 4 bits (NF4)"
    yield f"{quantised} needs {human_bytes(needed)} for 1 x {length} tokens and {verdict}"
