"""Compares the ways to tune a model within a memory budget: what each needs, reads and computes per optimiser step.

Every way takes the same rows per step. If the batch does not fit, or leaves room only for a small emulator, gradients
are accumulated one row at a time instead: activations take less memory, and the result is the same.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from emloc_core.exact.need import Positions, step_need
from emloc_core.memory.budget import Fit, largest_ratio, nf4_saving
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.speed import Speed

#: Below this ratio a plan warns. It comes from one trial on one small model, not from a benchmark.
LOW_RATIO = 0.4
#: From this ratio on, more room for the emulator is worth less than a larger batch.
_ENOUGH = 2 * LOW_RATIO
ORDINARY, NF4 = "LoRA on the base", "LoRA on the base in 4 bits"
EMULATOR, EXACT = "emulator, then polish", "exact steps"


@dataclass(frozen=True)
class Way:
    """One way to tune.

    Attributes:
        name: the way.
        bytes: its peak memory; for ``emulator, then polish``, the larger of tuning and polishing.
        fits: whether that is within the budget.
        micro_batch: rows in memory at once.
        accumulation: micro-batches per optimiser step.
        ratio: the emulator's ratio, if there is one.
        read_bytes: bytes of weights read from disk or RAM per optimiser step.
        flops: arithmetic per optimiser step; recomputation counts.
        seconds: how long an optimiser step takes at least on this machine; None if that was not measured.
    """

    name: str
    bytes: int
    fits: bool
    micro_batch: int
    accumulation: int
    ratio: float | None
    read_bytes: int
    flops: float
    seconds: float | None = None

    def describe(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def ways(model: MemoryModel, budget: int, fit: Fit | None, speed: Speed | None = None) -> list[Way]:
    """Compare the ways to tune a model.

    Args:
        model: its workload's batch size and accumulation set the rows per step.
        budget: bytes that may be used.
        fit: the largest emulator whose tuning fits with that batch, or None.
        speed: that of the machine, if it was measured.

    Returns:
        The ways, in order of preference: the base itself, in 4 bits, an emulator, exact steps.
    """
    rows = model.workload.batch_size * model.workload.train.accumulation
    tokens = rows * model.workload.length
    parameters, weights = model.parameters(), model.parameters() * model.dtype.itemsize
    passes = 6 if model.workload.train.gradient_checkpointing else 4  # per token and parameter: 2 each way, 2 again

    def way(name: str, need: int, micro_batch: int, **other: Any) -> Way:
        known = {"ratio": None, "read_bytes": 0, "flops": float(passes * parameters * tokens), **other}
        seconds = speed.seconds(known["flops"], known["read_bytes"]) if speed else None
        return Way(name, need, need <= budget, micro_batch, rows // micro_batch, seconds=seconds, **known)

    single = model.with_workload(replace(model.workload, batch_size=1))
    batch = model.workload.batch_size

    def first_fit(name: str, saved: int) -> Way:
        at_once = way(name, model.tuning().total - saved, batch)
        return at_once if at_once.fits or batch == 1 else way(name, single.tuning().total - saved, 1)

    ratio, emulator, size = fit.ratio if fit else None, model, batch
    if batch > 1 and (ratio is None or ratio < _ENOUGH):
        smaller = largest_ratio(single, budget)
        if smaller and (ratio is None or smaller.ratio > ratio):
            ratio, emulator, size = smaller.ratio, single, 1
    exact = _exact_need(model, rows)
    streamed = {"read_bytes": 2 * weights, "flops": float(6 * parameters * tokens)}
    plan = emulator.plan(ratio or 0.01)
    tuning = emulator.tuning(plan).total
    return [
        first_fit(ORDINARY, 0),
        first_fit(NF4, nf4_saving(model)),
        way(EMULATOR, max(tuning, exact), size, ratio=ratio, flops=float(passes * model.parameters(plan) * tokens)),
        way(EXACT, exact, 1, **streamed),
    ]


def best(found: Sequence[Way]) -> Way | None:
    """Return the recommended way: the first that fits and that this toolkit provides, or None."""
    return next((way for way in found if way.fits and way.name != NF4), None)


def _exact_need(model: MemoryModel, rows: int) -> int:
    """Return what exact steps need, one row at a time: see ``step_need``, and the LoRA with its optimiser."""
    tokens, patches = model.workload.length, model.workload.images * model.image.patches if model.image else 0
    need = step_need(
        model.model, model.family, Positions(rows * tokens, tokens), Positions(rows * patches, patches), model.dtype
    )
    lora = 4 * 4 * model.adapter_parameters()  # fp32: values, gradients, and the optimiser's two moments
    return sum(need.values()) + lora
