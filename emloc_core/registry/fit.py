"""Memory of a registry model, and the largest emulator whose tuning fits. Imports torch when called."""

from dataclasses import asdict, dataclass
from typing import Any

from emloc_core.registry.entry import Entry
from emloc_core.settings import AUTO, CompressSettings


@dataclass(frozen=True)
class EntryFit:
    """One entry's plan; all memory is in bytes, and None if ``error`` is set.

    Attributes:
        parameters: number of the base's parameters.
        length: tokens per row, including those of images.
        images: images per row.
        budget: memory for tuning.
        inference: what the base needs to read a prompt and generate a token.
        lora: what a LoRA on the base needs.
        kind: of the emulator: the one that is recommended for the budget; None if none fits.
        ratio: the largest multiple of 0.01 whose tuning fits; None if the kind has no ratio.
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
    kind: str | None = None
    ratio: float | None = None
    tuning: int | None = None
    emulator: int | None = None
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def fit(
    entry: Entry,
    budget: int | None = None,
    *,
    preset: str = "default",
    batch_size: int | None = None,
    length: int | None = None,
    kind: str = AUTO,
    device: str = "cuda",
) -> EntryFit:
    """Plan an entry.

    Args:
        entry: the model.
        budget: bytes that tuning may use; None: what inference on the base needs, as in the paper.
        preset: sets the LoRA, and the defaults of batch size and length.
        batch_size: rows per step.
        length: tokens per row.
        kind: of emulator; ``auto``: the one that is recommended for the budget.
        device: ``cuda`` or ``cpu``.

    Raises:
        EmlocError: there is no such preset, or the model cannot run the workload.
    """
    from emloc_core.memory.budget import largest_ratio, with_emulator
    from emloc_core.memory.workload import make_workload

    chosen = entry.preset(preset)
    train = chosen.train
    if batch_size is not None:
        train = train.model_copy(update={"batch_size": batch_size})
    with entry.config_file() as file:
        workload = make_workload(file, train, device, length=length or chosen.length)
        model = with_emulator(file, workload, CompressSettings(kind=kind), budget)
        inference = model.inference().total
        allowed = inference if budget is None else budget
        found = largest_ratio(model, allowed)
        return EntryFit(
            id=entry.id,
            family=entry.family,
            parameters=model.parameters(),
            batch_size=workload.batch_size,
            length=workload.length,
            images=workload.images,
            budget=allowed,
            inference=inference,
            lora=model.tuning().total,
            kind=model.kind.name if found else None,
            ratio=found.ratio if found and model.kind.has_factors else None,
            tuning=found.need.total if found else None,
            emulator=model.weight_bytes(found.ratio) if found else None,
        )
