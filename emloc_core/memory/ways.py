"""Compares the ways to tune a model within a memory budget: what each needs, reads and computes per optimiser step.

Every way takes the same rows per step. If the batch does not fit, or leaves room only for a small emulator, gradients
are accumulated one row at a time instead: activations take less memory, and the result is the same.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emloc_core.exact.need import Positions, lora_need, step_need
from emloc_core.memory import arithmetic, stages
from emloc_core.memory.budget import largest_ratio
from emloc_core.memory.evidence import Recovery, alternative_to, measured
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.speed import Speed
from emloc_core.model.overhead import overhead

#: From this ratio on, more room for the emulator is worth less than a larger batch.
_ENOUGH = 0.8
ORDINARY, EMULATOR, POLISHED, EXACT = "LoRA on the base", "emulator", "emulator, then polish", "exact steps"


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
        compress_bytes: peak memory of stage 1, which makes the emulator; 0 without one.
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
    compress_bytes: int = 0
    compress_flops: float = 0.0
    seconds: float | None = None
    compress_seconds: float | None = None

    @property
    def recovery(self) -> Recovery | None:
        """What was measured of the emulator's kind at its size or a smaller one, or None."""
        return measured(self.kind, self.ratio) if self.kind else None

    @property
    def alternative(self) -> str | None:
        """The kind that was better on one of the tasks of :attr:`recovery`, or None; a recipe tries it if it fits."""
        return alternative_to(self.kind, self.ratio) if self.kind else None

    def describe(self) -> dict[str, Any]:
        """Return it as JSON values."""
        recovery = self.recovery._asdict() if self.recovery else None
        return {**asdict(self), "recovery": recovery, "alternative": self.alternative}


def ways(model: MemoryModel, budget: int, speed: Speed | None = None) -> list[Way]:
    """Compare the ways to tune a model.

    Args:
        model: its workload's batch size and accumulation set the rows per step.
        budget: bytes that may be used.
        speed: that of the machine, if it was measured.

    Returns:
        The ways, in order of preference: the base itself, emulators, exact steps. Emulators of the recommended kinds
        come first, up to the first that fits, and then that of the planned kind.
    """
    rows, sequences = model.workload.rows_per_step, model.workload.sequences_per_row
    forward, weights = sequences * arithmetic.forward(model), model.parameters() * model.dtype.itemsize
    passes = 3 if model.workload.train.gradient_checkpointing else 2  # forward, perhaps once more, and backward
    # Exact steps know the likelihood of answers alone: they would undo what was learned from preferences.
    exact = 0 if model.workload.train.learns_preferences else exact_need(model, rows)

    def way(name: str, need: int, micro_batch: int, **other: Any) -> Way:
        flops = float(rows * passes * forward)
        known = {"kind": None, "ratio": None, "read_bytes": 0, "flops": flops, **other}
        seconds = speed.seconds(known["flops"], known["read_bytes"]) if speed else None
        return Way(name, need, need <= budget, micro_batch, rows // micro_batch, seconds=seconds, **known)

    sizes = [model]  # the batch at once, and one row at a time
    if model.workload.batch_size > 1:
        sizes.append(model.with_workload(model.workload.one_row_at_a_time()))

    def ordinary() -> Way:
        for of in sizes:
            found = way(ORDINARY, of.tuning().total, of.workload.batch_size)
            if found.fits:
                break
        return found

    def emulator(of: MemoryModel, ratio: float | None, need: int) -> Way:
        plan = of.plan(ratio or of.kind.smallest_ratio)
        sized = {"kind": of.kind.name, "ratio": ratio if of.kind.has_factors else None}
        making = arithmetic.compress(of, plan)
        cost = {
            "flops": float(rows * passes * sequences * arithmetic.forward(of, plan)),
            "compress_bytes": stages.compress(of, plan).total,
            "compress_flops": float(sum(making)),
            "compress_seconds": speed.seconds(making.own, weights, making.single) if speed else None,
        }
        return way(POLISHED if exact else EMULATOR, max(need, exact), of.workload.batch_size, **cost, **sized)

    emulators: list[Way] = []
    for name in model.workload.recommended_kinds:
        of_kind = sizes if name == model.kind.name else [each.with_kind(name) for each in sizes]
        if of_kind[0].kind.is_usable():
            emulators.append(emulator(*_sized(of_kind, budget)))
            if emulators[-1].fits:
                break
    if model.kind.name not in [each.kind for each in emulators]:
        emulators.append(emulator(*_sized(sizes, budget)))
    streamed = {"read_bytes": 2 * weights, "flops": float(rows * 3 * forward)}
    return [ordinary(), *emulators, *([way(EXACT, exact, 1, **streamed)] if exact else [])]


def best(found: Sequence[Way]) -> Way | None:
    """Return the recommended way: the first that fits, or None."""
    return next((way for way in found if way.fits), None)


def _sized(sizes: Sequence[MemoryModel], budget: int) -> tuple[MemoryModel, float | None, int]:
    """Return how the largest emulator that fits is tuned, its ratio, and what that needs; of the smallest if none fits.

    Args:
        sizes: the batch at once, and one row at a time, which is taken where that leaves more room.
        budget: bytes that may be used.
    """
    model, fit = sizes[0], largest_ratio(sizes[0], budget)
    if len(sizes) > 1 and (fit is None or (model.kind.has_factors and fit.ratio < _ENOUGH)):
        smaller = largest_ratio(sizes[1], budget)
        if smaller and (fit is None or smaller.ratio > fit.ratio):
            model, fit = sizes[1], smaller
    if fit:
        return model, fit.ratio, fit.need.total
    return model, None, model.tuning(model.plan(model.kind.smallest_ratio)).total


def exact_need(model: MemoryModel, rows: int) -> int:
    """Return what exact steps need, one row at a time: see ``step_need``; the LoRA with its optimiser; and torch.

    What they keep at block boundaries moves from a GPU to the CPU's memory, where it does not fit.
    """
    tokens, patches = model.workload.length, model.workload.images * model.image.patches if model.image else 0
    need = step_need(
        model.model, model.family, Positions(rows * tokens, tokens), Positions(rows * patches, patches), model.dtype
    )
    device = model.workload.device
    if device == "cuda":
        need["boundaries"] = 0
    return sum(need.values()) + lora_need(model.adapter_parameters()) + overhead(device, tuning=True)
