"""Memory of a registry model, and the largest emulator whose tuning fits. Imports torch when called."""

from dataclasses import dataclass
from typing import Any

from emloc_core.memory.budget import Budget
from emloc_core.registry.entry import Entry
from emloc_core.settings import AUTO, CompressSettings


@dataclass(frozen=True)
class EntryFit:
    """One entry's plan; all memory is in bytes, and None if ``error`` is set.

    Attributes:
        length: tokens per row, including those of images.
        budget: memory for tuning, without what stays free.
        inference: what the base needs to read a prompt and generate a token.
        lora: what a LoRA on the base needs.
        way: how to tune it, by the decision for the budget; None if no way fits.
        kind: kind of the best emulator that fits; None if none does.
        ratio: the largest multiple of 0.01 whose tuning fits; None if the kind has no ratio.
        micro_batch: rows per forward pass when that emulator is tuned.
        tuning: what a LoRA on that emulator needs.
        emulator: that emulator's weights.
        error: why it cannot be planned, or empty.
    """

    id: str
    family: str
    parameters: int | None = None
    batch_size: int | None = None
    length: int | None = None
    images: int | None = None
    budget: int | None = None
    inference: int | None = None
    lora: int | None = None
    way: str | None = None
    kind: str | None = None
    ratio: float | None = None
    micro_batch: int | None = None
    tuning: int | None = None
    emulator: int | None = None
    error: str = ""


def fit(
    entry: Entry,
    budget: Budget | None = None,
    *,
    preset: str = "default",
    batch_size: int | None = None,
    length: int | None = None,
    kind: str = AUTO,
    device: str = "cuda",
) -> EntryFit:
    """Plan an entry.

    Args:
        budget: memory for tuning; by default what inference on the base needs, as in the paper.
        preset: sets the LoRA, and the defaults of batch size and length.
        batch_size: rows per step.
        length: tokens per row.
        kind: kind of emulator; ``auto`` takes the one that is recommended for the budget.
        device: its type.

    Raises:
        EmlocError: there is no such preset, or the model cannot run the workload.
    """
    from emloc_core.memory.decision import decide
    from emloc_core.memory.ways import ORDINARY
    from emloc_core.memory.workload import make_workload

    chosen = entry.preset(preset)
    train = chosen.train
    if batch_size is not None:
        train = train.model_copy(update={"batch_size": batch_size})
    with entry.config_file() as file:
        workload = make_workload(file, train, device, length=length or chosen.length)
        decision = decide(file, workload, budget, CompressSettings(kind=kind))
    ordinary, emulator = next(way for way in decision.ways if way.name == ORDINARY), decision.emulator
    emulator_fields: dict[str, Any] = {}
    if emulator is not None:
        emulator_fields = {
            "kind": emulator.kind,
            "ratio": emulator.ratio,
            "micro_batch": emulator.micro_batch,
            "tuning": emulator.bytes,
            "emulator": emulator.model.emulator_bytes(emulator.model.plan(emulator.ratio)),
        }
    return EntryFit(
        id=entry.id,
        family=entry.family,
        parameters=ordinary.model.parameters(),
        batch_size=workload.batch_size,
        length=workload.length,
        images=workload.images,
        budget=decision.budget.usable,
        inference=decision.base.inference().total,
        lora=ordinary.bytes,
        way=decision.way.name if decision.way else None,
        **emulator_fields,
    )
