"""The loss of a system on held-out pictures."""

from collections.abc import Sequence
from pathlib import Path

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.held_out import summed_loss
from emloc_core.data.row import Row
from emloc_core.model.opened import OpenModel, open_model
from emloc_diffusers.objective import patch_side


class Losses:
    """The loss of a model, with and without adapters, on held-out rows, with the same noise for all.

    Args:
        model: its directory, or its pipeline's. It is streamed, so it need not fit in memory.
        rows: the rows.
        side: height and width in pixels that the pictures are scaled down to.

    Raises:
        EmlocError: the rows are not pictures with prompts.
    """

    def __init__(self, model: str, rows: Sequence[Row], side: int) -> None:
        self.model: OpenModel = open_model(model)
        self.model.objective.require_rows(rows, self.model.family)
        patches = max(1, side // patch_side(self.model)) ** 2  # of a square
        self.samples = self.model.samples(rows, patches, "evaluation")

    def mean(self, adapter: Path | None) -> float:
        """Return the mean loss of a picture.

        Raises:
            EmlocError: the directory is not an adapter, or not for such a model.
        """
        loras = Adapter(adapter).loras if adapter else {}
        total = summed_loss(self.model.skeleton, self.samples, loras)
        return float(total[0] / total[1])
