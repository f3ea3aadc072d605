"""Scores of a system on held-out pictures: its loss on them, and how similar its own pictures are."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.held_out import summed_loss
from emloc_core.data.row import Row
from emloc_core.errors import EmlocError
from emloc_core.files.pretrained import load_model, load_processing
from emloc_core.model.opened import OpenModel, open_model
from emloc_diffusers.objective import patch_side

if TYPE_CHECKING:
    from PIL.Image import Image


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


class Judge:
    """A CLIP or DINO that scores how similar pictures are, as in DreamBooth (Ruiz et al., 2023, arXiv 2208.12242).

    Args:
        directory: directory of the model, with its image processor.

    Raises:
        EmlocError: the model gives no features of pictures, or cannot be loaded.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self._processor = load_processing("AutoImageProcessor", directory)
            self._model = load_model("AutoModel", directory).eval()
        except (OSError, ValueError) as error:
            raise EmlocError(
                f"{directory} is not a model that can judge pictures: {error}",
                "Give the directory of a CLIP or a DINOv2, in the layout of transformers.",
            ) from error

    @torch.no_grad()
    def features(self, pictures: "Sequence[Image]") -> torch.Tensor:
        """Return features of pictures, (N, d), each of length 1: CLIP's image embeddings, or DINO's first token."""
        inputs = self._processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")
        pixels = inputs["pixel_values"].to(self._model.dtype)
        if hasattr(self._model, "get_image_features"):
            features = self._model.get_image_features(pixel_values=pixels).pooler_output
        else:
            features = self._model(pixel_values=pixels).last_hidden_state[:, 0]
        return functional.normalize(features.float(), dim=-1)

    def similarity(self, pictures: "Sequence[Image]", references: "Sequence[Image]") -> float:
        """Return the mean cosine similarity of every picture to every reference, -1 to 1."""
        return float((self.features(pictures) @ self.features(references).T).mean())
