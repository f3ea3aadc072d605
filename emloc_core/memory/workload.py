"""The workload to plan for; by default stage 2's batch size, TRL's maximum length and one image."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from emloc_core.data.columns import NO_RENAMING
from emloc_core.data.limits import Limits
from emloc_core.data.rows import load_rows
from emloc_core.devices import type_of
from emloc_core.errors import EmlocError
from emloc_core.memory.planned_model import planned_model
from emloc_core.model.device import choose_device
from emloc_core.model.image_shape import image_shape
from emloc_core.plugins.manager import plugin_manager
from emloc_core.requests import Rows
from emloc_core.settings import TrainSettings
from emloc_core.standins import RECOMMENDED, RECOMMENDED_WITH_IMAGES
from emloc_core.standins.registry import format_named

#: Default maximum length of TRL's ``SFTConfig``.
LENGTH = 1024


@dataclass(frozen=True)
class Workload:
    """The batch, and how it is trained on.

    Attributes:
        batch_size: rows per forward pass.
        length: tokens per row, including image tokens.
        images: images per row; if the vision tower takes one size only, tiles of that size.
        image_size: height and width of images in pixels; None: see :func:`emloc_core.model.image_shape.image_shape`.
        rows: how many rows there are in all; None if that is not known.
        train: the settings of stage 2; its batch size and maximum length are ignored.
        device: its type: ``cpu``, or an accelerator's, where TRL's loss needs less memory.
    """

    batch_size: int
    length: int
    images: int = 0
    train: TrainSettings = field(default_factory=TrainSettings)
    device: str = "cuda"
    image_size: tuple[int, int] | None = None
    rows: int | None = None

    @property
    def rows_per_step(self) -> int:
        """Rows per optimiser step."""
        return self.batch_size * self.train.accumulation

    @property
    def sequences_per_row(self) -> int:
        """Sequences that a row is: with preferences, one with the chosen answer and one with the rejected one."""
        return 2 if self.train.objective in ("dpo", "orpo") else 1

    @property
    def recommended_kinds(self) -> tuple[str, ...]:
        """Kinds of emulator that can be made here, the best for such rows first."""
        kinds = RECOMMENDED_WITH_IMAGES if self.images else RECOMMENDED
        return tuple(kind for kind in kinds if format_named(kind).is_available)

    @property
    def micro_batches(self) -> list[int]:
        """Smaller micro-batches that a step can be taken in, the largest first: half of the batch, a quarter and so on.

        KTO compares the rows of a micro-batch, so it needs two.
        """
        halves = [self.batch_size >> times for times in range(1, self.batch_size.bit_length())]
        least = 2 if self.train.learns_labels else 1
        return [rows for rows in halves if rows >= least and self.rows_per_step % rows == 0]

    def at_once(self, rows: int) -> "Workload":
        """Return it with as many rows per step, whose gradients are accumulated over micro-batches of so many rows."""
        train = self.train.model_copy(update={"batch_size": rows, "accumulation": self.rows_per_step // rows})
        return replace(self, batch_size=rows, train=train)


def make_workload(
    config_file: Path,
    train: TrainSettings,
    device: str = "auto",
    *,
    length: int | None = None,
    images: int | None = None,
    image_size: tuple[int, int] | None = None,
    data: Rows | None = None,
    split: str = "train",
    columns: Mapping[str, str] = NO_RENAMING,
    skip_bad_rows: bool = False,
) -> Workload:
    """Return the workload to plan for.

    Args:
        config_file: the model's config; with ``data``, its tokenizer or processor is in the same directory.
        device: ``cpu``, ``cuda`` or another type, or ``auto``: the one that this machine tunes on.
        length: tokens per row; with ``data``, the length to which rows are cut. Without either, 1024 or the model's
            limit.
        images: images or tiles per row; by default those of the rows, or 1 for an image-text model.
        image_size: height and width of images in pixels, if the model takes any size; by default that of the rows.
        data: rows; the longest sets the length, and the row with most pixels the images.

    Raises:
        EmlocError: there is no tokenizer, or it cannot handle a row.
    """
    model = planned_model(config_file)
    family, config = model.family, model.outline.config
    limits = Limits.for_config(config)
    limit, known_rows = limits.tokens, None
    counted = int(family.modality == "image-text")
    if data is not None:
        rows = load_rows(data, split, columns=columns, skipped=[] if skip_bad_rows else None)
        known_rows = len(rows)
        answers = [answer for row in rows for answer in (row.answers() if train.learns_preferences else (row,))]
        objective = plugin_manager().objective_of(family)
        length, counted, largest = objective.longest(config_file, family, answers, length, limits)
        if images is None and image_size is None and largest is not None:
            image_size = largest
            length = max(length, counted * image_shape(config_file, config, image_size).tokens + 1)
    if length is not None and limit is not None and length > limit:
        raise EmlocError(f"The model takes at most {limit} tokens, not {length}.", f"Give a length of at most {limit}.")
    length = length or min(LENGTH, limit or LENGTH)
    where = choose_device().type if device == "auto" else type_of(device)
    shape = {"images": counted if images is None else images, "image_size": image_size}
    return Workload(train.batch_size, length, train=train, device=where, rows=known_rows, **shape)  # type: ignore[arg-type]
