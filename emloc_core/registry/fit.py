"""What a model of the registry needs, and the largest emulator whose tuning fits. Imports torch when it is called."""

from dataclasses import asdict, dataclass
from typing import Any

from emloc_core.registry.entry import Entry


@dataclass(frozen=True)
class EntryFit:
    """One entry's plan; bytes are None where ``error`` says why there is none.

    Attributes:
        parameters: of the base.
        length: tokens a row that are planned for, those of images included.
        images: images a row.
        budget: what tuning may use.
        inference: what the base needs to read a prompt and write a token.
        lora: what a LoRA on the base needs.
        ratio: the largest, in hundredths, whose tuning fits; None where none does.
        tuning: what a LoRA on the emulator of that ratio needs.
        emulator: that emulator's weights.
        error: why it cannot be planned; empty where it was.
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
    device: str = "cuda",
) -> EntryFit:
    """Plan an entry.

    Args:
        entry: the model.
        budget: bytes that tuning may use; None is what inference on the base needs, as in the paper.
        preset: says the LoRA, and batch and length where these are None.
        batch_size: rows.
        length: tokens a row.
        device: ``cuda`` or ``cpu``.

    Raises:
        EmlocError: there is no such preset, or the model does not suit the workload.
    """
    from emloc_core.memory.budget import largest_ratio
    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import make_workload

    chosen = entry.preset(preset)
    _, train = chosen.settings(0.5)
    if batch_size is not None:
        train = train.model_copy(update={"batch_size": batch_size})
    with entry.config_file() as file:
        workload = make_workload(file, train, device, length=length or chosen.length)
        model = MemoryModel(file, workload)
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
            ratio=found.ratio if found else None,
            tuning=found.need.total if found else None,
            emulator=model.weight_bytes(found.ratio) if found else None,
        )
