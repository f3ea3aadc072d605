"""Compares the ways to tune a model within a memory budget: what each needs, reads and computes per optimiser step.

Every way takes the same rows per step. If the batch does not fit, or leaves room only for a small emulator, gradients
are accumulated one row at a time instead: activations take less memory, and the result is the same.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from emloc_core.exact.need import Positions, step_need
from emloc_core.kinds import RECOMMENDED, Kind
from emloc_core.memory import arithmetic
from emloc_core.memory.budget import Fit, largest_ratio
from emloc_core.memory.evidence import Recovery, measured
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.speed import Speed

#: From this ratio on, more room for the emulator is worth less than a larger batch.
_ENOUGH = 0.8
ORDINARY, EMULATOR, EXACT = "LoRA on the base", "emulator, then polish", "exact steps"


@dataclass(frozen=True)
class Way:
    """One way to tune.

    Attributes:
        name: the way.
        bytes: its peak memory; for ``emulator, then polish``, the larger of tuning and polishing.
        fits: whether that is within the budget.
        micro_batch: rows in memory at once.
        accumulation: micro-batches per optimiser step.
        kind: the emulator's kind, if there is an emulator.
        ratio: the emulator's ratio, if it has one.
        read_bytes: bytes of weights read from disk or RAM per optimiser step.
        flops: arithmetic per optimiser step; recomputation counts.
        compress_flops: arithmetic of stage 1, which makes the emulator; 0 without one.
        seconds: how long an optimiser step takes at least on this machine; None if that was not measured.
        compress_seconds: how long stage 1 takes at least, likewise.
    """

    name: str
    bytes: int
    fits: bool
    micro_batch: int
    accumulation: int
    kind: str | None
    ratio: float | None
    read_bytes: int
    flops: float
    compress_flops: float = 0.0
    seconds: float | None = None
    compress_seconds: float | None = None

    @property
    def recovery(self) -> Recovery | None:
        """What was measured of the emulator's kind at its size or a smaller one, or None."""
        return measured(self.kind, self.ratio) if self.kind else None

    def describe(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "recovery": self.recovery._asdict() if self.recovery else None}


def ways(model: MemoryModel, budget: int, fit: Fit | None, speed: Speed | None = None) -> list[Way]:
    """Compare the ways to tune a model.

    Args:
        model: its workload's batch size and accumulation set the rows per step.
        budget: bytes that may be used.
        fit: the largest emulator whose tuning fits with that batch, or None.
        speed: that of the machine, if it was measured.

    Returns:
        The ways, in order of preference: the base itself, emulators, exact steps. Emulators of the recommended kinds
        come first, up to the first that fits, and then that of the planned kind.
    """
    rows = model.workload.batch_size * model.workload.train.accumulation
    forward, weights = arithmetic.forward(model), model.parameters() * model.dtype.itemsize
    passes = 3 if model.workload.train.gradient_checkpointing else 2  # forward, perhaps once more, and backward
    exact = _exact_need(model, rows)

    def way(name: str, need: int, micro_batch: int, **other: Any) -> Way:
        flops = float(rows * passes * forward)
        known = {"kind": None, "ratio": None, "read_bytes": 0, "flops": flops, **other}
        seconds = speed.seconds(known["flops"], known["read_bytes"]) if speed else None
        return Way(name, need, need <= budget, micro_batch, rows // micro_batch, seconds=seconds, **known)

    sizes = [model]  # the batch at once, and one row at a time
    if model.workload.batch_size > 1:
        sizes.append(model.with_workload(replace(model.workload, batch_size=1)))

    def ordinary() -> Way:
        for of in sizes:
            found = way(ORDINARY, of.tuning().total, of.workload.batch_size)
            if found.fits:
                break
        return found

    def emulator(kind: Kind, ratio: float | None, of: MemoryModel, need: int) -> Way:
        plan = of.plan(ratio or kind.smallest_ratio)
        sized = {"kind": kind.name, "ratio": ratio if kind.has_ratio else None}
        making = arithmetic.compress(of, plan)
        cost = {
            "flops": float(rows * passes * arithmetic.forward(of, plan)),
            "compress_flops": float(sum(making)),
            "compress_seconds": speed.seconds(making.own, weights, making.single) if speed else None,
        }
        return way(EMULATOR, max(need, exact), of.workload.batch_size, **cost, **sized)

    emulators: list[Way] = []
    for name in RECOMMENDED:
        of_kind = [each.with_kind(name) for each in sizes]
        if of_kind[0].kind.is_usable():
            emulators.append(emulator(of_kind[0].kind, *_by_weights(of_kind, budget)))
            if emulators[-1].fits:
                break
    if model.kind.name not in [each.kind for each in emulators]:
        emulators.append(emulator(model.kind, *_traced(sizes, budget, fit)))
    streamed = {"read_bytes": 2 * weights, "flops": float(rows * 3 * forward)}
    return [ordinary(), *emulators, way(EXACT, exact, 1, **streamed)]


def best(found: Sequence[Way]) -> Way | None:
    """Return the recommended way: the first that fits, or None."""
    return next((way for way in found if way.fits), None)


def _traced(sizes: Sequence[MemoryModel], budget: int, fit: Fit | None) -> tuple[float | None, MemoryModel, int]:
    """Return the largest ratio that fits, how it is tuned, and what that needs.

    Args:
        sizes: the batch at once, and one row at a time, which is taken where that leaves more room.
        budget: bytes that may be used.
        fit: the largest emulator whose tuning fits with the batch at once, or None.
    """
    model, ratio = sizes[0], fit.ratio if fit else None
    if len(sizes) > 1 and (ratio is None or (model.kind.has_factors and ratio < _ENOUGH)):
        smaller = largest_ratio(sizes[1], budget)
        if smaller and (ratio is None or smaller.ratio > ratio):
            model, ratio = sizes[1], smaller.ratio
    return ratio, model, model.tuning(model.plan(ratio or model.kind.smallest_ratio)).total


def _by_weights(sizes: Sequence[MemoryModel], budget: int) -> tuple[float | None, MemoryModel, int]:
    """Return what :func:`_traced` does, from the weights alone: all else needs what it needs on the base."""
    found: list[tuple[float | None, MemoryModel, int]] = []
    for model in sizes:
        rest = model.tuning().total - model.parameters() * model.dtype.itemsize

        def need(hundredths: int, model: MemoryModel = model, rest: int = rest) -> int:
            return rest + model.weight_bytes(hundredths / 100)

        ratios = range(round(100 * model.kind.smallest_ratio), round(100 * model.kind.largest_ratio) + 1)
        fitting = ratios[: bisect_right(ratios, budget, key=need)]
        largest = fitting[-1] if fitting else 0
        found.append((largest / 100 or None, model, need(largest or ratios[0])))
        if largest >= 100 * _ENOUGH:
            break
    return max(found, key=lambda each: each[0] or 0)


def _exact_need(model: MemoryModel, rows: int) -> int:
    """Return what exact steps need, one row at a time: see ``step_need``, and the LoRA with its optimiser."""
    tokens, patches = model.workload.length, model.workload.images * model.image.patches if model.image else 0
    need = step_need(
        model.model, model.family, Positions(rows * tokens, tokens), Positions(rows * patches, patches), model.dtype
    )
    lora = 4 * 4 * model.adapter_parameters()  # fp32: values, gradients, and the optimiser's two moments
    return sum(need.values()) + lora
