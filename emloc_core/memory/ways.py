"""The ways to tune a model within a memory: what each needs, reads and computes per optimiser step.

Every way takes the same rows per step. If the batch does not fit, or leaves room only for a small emulator, gradients
are accumulated over micro-batches instead, of as many rows as fit: activations take less memory, and the result is the
same.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from emloc_core.memory import arithmetic, streamed
from emloc_core.memory.budget import largest_ratio
from emloc_core.memory.evidence import Recovery, exact_steps_pay, measured
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.speed import Speed

#: From this ratio on, more room for the emulator is worth less than a larger batch.
_ENOUGH = 0.8
ORDINARY, EMULATOR, POLISHED, EXACT = "LoRA on the base", "emulator", "emulator, then polish", "exact steps"
#: What recipes call the ways.
_KEYS = {ORDINARY: "lora", EMULATOR: "emulator", POLISHED: "emulator", EXACT: "exact"}


@dataclass(frozen=True)
class Way:
    """One way to tune.

    Attributes:
        model: the model's memory under this way: so many rows at once, and this kind of emulator.
        bytes: its peak memory; for ``emulator, then polish``, the larger of tuning and polishing.
        fits: whether that is within the budget.
        read_bytes: bytes of weights read from disk or RAM per optimiser step.
        flops: arithmetic per optimiser step; recomputation counts.
        compress_bytes: peak memory of stage 1, which makes the emulator; 0 without one.
        seconds: how long an optimiser step takes at least on this machine; None if that was not measured.
    """

    name: str
    model: MemoryModel = field(repr=False)
    bytes: int
    fits: bool
    kind: str | None = None
    ratio: float | None = None
    read_bytes: int = 0
    flops: float = 0.0
    compress_bytes: int = 0
    seconds: float | None = None

    @property
    def key(self) -> str:
        """What a recipe calls it: ``lora``, ``emulator`` or ``exact``."""
        return _KEYS[self.name]

    @property
    def is_polished(self) -> bool:
        """Whether exact steps follow the correction."""
        return self.name == POLISHED

    def __str__(self) -> str:
        """Return it in words: ``emulator (nf4), 1 x 8 rows per step``."""
        kind = f" ({self.kind}{f' at ratio {self.ratio:g}' if self.ratio is not None else ''})" if self.kind else ""
        return f"{self.name}{kind}, {self.micro_batch} x {self.accumulation} rows per step"

    @property
    def micro_batch(self) -> int:
        """Rows in memory at once."""
        return self.model.workload.batch_size

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimiser step."""
        return self.model.workload.train.accumulation

    @property
    def step_settings(self) -> dict[str, int]:
        """The rows of a step, as settings of stage 2."""
        return {"batch_size": self.micro_batch, "accumulation": self.accumulation}

    @property
    def emulator_settings(self) -> dict[str, Any]:
        """The kind and the ratio of its emulator, where it has them, as settings of stage 1."""
        return {name: value for name in ("kind", "ratio") if (value := getattr(self, name)) is not None}

    @property
    def recovery(self) -> Recovery | None:
        """What was measured of the emulator's kind at its size or a smaller one, or None."""
        return measured(self.kind, self.ratio) if self.kind else None

    def describe(self) -> dict[str, Any]:
        """Return it as JSON values."""
        own = {attribute.name: getattr(self, attribute.name) for attribute in fields(self) if attribute.name != "model"}
        recovery = self.recovery._asdict() if self.recovery else None
        rows = {"micro_batch": self.micro_batch, "accumulation": self.accumulation}
        return {**own, **rows, "recovery": recovery}


def ways(
    model: MemoryModel, kinds: Sequence[str], budget: int, ratio: float | None = None, speed: Speed | None = None
) -> list[Way]:
    """Compare the ways to tune a model.

    Args:
        model: its workload's batch size and accumulation set the rows per step.
        kinds: kinds of emulator, the best first; kinds after the first that fits are not tried.
        budget: bytes that may be used.
        ratio: the emulator's; None: the largest that fits.

    Returns:
        The ways, in order of preference: the base itself, emulators, exact steps.
    """
    rows, sequences = model.workload.rows_per_step, model.workload.sequences_per_row
    forward, weights = sequences * arithmetic.forward(model), model.nbytes
    passes = 3 if model.workload.train.gradient_checkpointing else 2  # forward, perhaps once more, and backward
    exact = streamed.exact(model).total if model.workload.train.can_be_exact else 0
    workload = model.workload
    sizes = [model, *(model.with_workload(workload.at_once(rows)) for rows in workload.micro_batches)]

    def way(name: str, sized: MemoryModel, need: int, **other: Any) -> Way:
        costs = {"flops": float(rows * passes * forward), "read_bytes": 0, **other}
        seconds = speed.seconds(costs["flops"], costs["read_bytes"]) if speed else None
        return Way(name, sized, need, need <= budget, seconds=seconds, **costs)

    def ordinary() -> Way:
        sized = _most_rows(sizes, lambda size: size.fits(budget))
        return way(ORDINARY, sized, sized.tuning().total)

    def emulator(kind: str) -> Way:
        kind_sizes = sizes if kind == model.format.name else [size.with_kind(kind) for size in sizes]
        sized, chosen, need = _sized(kind_sizes, budget, ratio)
        plan = sized.plan(chosen)
        emulator_ratio = chosen if sized.format.ratios else None
        polished = 0 < exact <= budget and exact_steps_pay(kind, emulator_ratio)
        return way(
            POLISHED if polished else EMULATOR,
            sized,
            max(need, exact) if polished else need,
            kind=kind,
            ratio=emulator_ratio,
            flops=float(rows * passes * sequences * arithmetic.forward(sized, plan)),
            compress_bytes=streamed.compress(sized, plan).total,
        )

    compared = [ordinary()]
    for kind in kinds:
        compared.append(emulator(kind))
        if compared[-1].fits:
            break
    if exact:
        compared.append(way(EXACT, sizes[-1], exact, read_bytes=2 * weights, flops=float(rows * 3 * forward)))
    return compared


def _sized(
    sizes: Sequence[MemoryModel], budget: int, ratio: float | None = None
) -> tuple[MemoryModel, float | None, int]:
    """Return the model with the largest emulator that fits, its ratio and its need; with the smallest if none does.

    Args:
        sizes: the batch at once, and smaller micro-batches, which are taken where they leave more room.
        budget: bytes that may be used.
        ratio: the emulator's, instead of the largest.
    """

    def need(model: MemoryModel, ratio: float | None) -> int:
        return model.tuning(model.plan(ratio)).total

    if ratio is not None:
        model = _most_rows(sizes, lambda size: size.fits(budget, size.plan(ratio)))
        return model, ratio, need(model, ratio)

    def largest(model: MemoryModel) -> float:
        """Return the largest ratio that fits, 1 if there is a single size, and 0 if nothing fits."""
        fit = largest_ratio(model, budget)
        return 0.0 if fit is None else 1.0 if fit.ratio is None else fit.ratio

    ratios = sizes[0].format.ratios
    enough = _ENOUGH if ratios else 1.0
    model = _most_rows(sizes, lambda size: largest(size) >= enough)
    model = max(sizes[0], model, key=largest)  # the first of equal ones
    best = largest(model) if ratios else None
    if not largest(model):
        model, best = sizes[-1], sizes[-1].smallest_ratio
    return model, best, need(model, best)


def _most_rows(sizes: Sequence[MemoryModel], fits: Callable[[MemoryModel], bool]) -> MemoryModel:
    """Return the largest micro-batch that fits, or the smallest of all if none does.

    Args:
        sizes: from the largest to the smallest; after one that fits, all do.
        fits: whether one does; it may take a second, so few are tried, and those between only if the smallest fits.
    """
    first, *others = sizes
    if not others or fits(first):
        return first
    *between, least = others
    if not fits(least):
        return least
    return others[bisect_left(between, True, key=fits)]
