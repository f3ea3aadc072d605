"""Rows of tokens as plans know them: see :class:`emloc_core.objective.Step`.

What is kept of earlier runs is planned without transformers, which takes seconds to import.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.data.limits import Limits
from emloc_core.data.row import Row
from emloc_core.devices import is_accelerator
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.model.inside import hidden_size
from emloc_core.objective import Longest, Purpose, RowSize

if TYPE_CHECKING:
    import torch


class TokenStep:
    """Tokens, and images among them.

    Raises:
        EmlocError: images leave no room for text.
    """

    def __init__(self, memory: MemoryModel) -> None:
        self._memory = memory
        self.inputs = self._shape_inputs()
        workload, image = memory.workload, memory.image
        self.row = RowSize(workload.length, workload.images * image.patches if image else 0)
        self.logits: int = workload.length * memory.config.get_text_config().vocab_size

    def _shape_inputs(self) -> Mapping[str, Any]:
        workload, image = self._memory.workload, self._memory.image
        # Rows of a batch differ in length, so attention needs a mask; a single row needs none.
        rows = workload.batch_size * workload.sequences_per_row
        inputs = {"rows": rows, "length": workload.length, "padded": rows > 1}
        if image is None:
            return inputs
        tokens = workload.images * image.tokens
        if tokens >= workload.length:
            raise EmlocError(
                f"{workload.images} images of {image.tokens} tokens each leave no room for text in {workload.length} "
                "tokens.",
                "Give fewer images or a greater length.",
            )
        token = self._memory.config.image_token_id
        return {**inputs, "images": workload.images, "image": image, "image_token": token}

    def positions(self, path: str) -> int:
        """Return how many positions pass through a module: tokens, patches, or the tokens that patches become."""
        memory = self._memory
        image, images = memory.image, memory.workload.images
        *others, language = (tower.blocks for tower in memory.family.towers)
        if any(path.startswith(f"{blocks}.") for blocks in others):
            return images * image.patches if image else 0
        head = memory.model.get_output_embeddings()
        outside = not path.startswith(f"{language}.") and memory.model.get_submodule(path) is not head
        if outside and memory.family.modality == "image-text":  # between the towers
            return images * image.tokens if image else 0
        return memory.workload.length

    def waiting(self, purpose: Purpose, rows: int) -> int:  # noqa: ARG002 - a row is one sample
        """Return the bytes of the rows' images, and of their hidden states where a tower has most."""
        memory = self._memory
        hidden = [self.positions(f"{path}.0") * hidden_size(memory.model.get_submodule(path)) for path in memory.towers]
        pixels = memory.workload.images * prod(memory.image.pixels) if memory.image else 0
        return rows * (pixels + max(hidden)) * memory.dtype.itemsize

    def before(self) -> Sequence[Need]:
        """Return nothing: tokenizers are small."""
        return ()

    @contextmanager
    def tracing(self, model: Any) -> Iterator[None]:
        """Make tensors fake; on a GPU, count TRL's loss as the one kernel per tile that it is there."""
        from emloc_core.compat.trl import tiles_in_place, tiles_of
        from emloc_core.memory.fake import fake
        from emloc_core.standins.vocabulary import rows_at_once

        in_place = tiles_in_place() if is_accelerator(self._memory.workload.device) else nullcontext()
        with fake(self.inputs), in_place, tiles_of(rows_at_once(model)):
            yield

    def widths(self, model: Any) -> Sequence[int]:
        """Return the widths of the vocabulary and of TRL's tiles, if its loss has any."""
        from emloc_core.compat.trl import tile_width

        vocabulary, tile = model.config.get_text_config().vocab_size, tile_width()
        if tile is None:
            return [vocabulary]
        return [vocabulary, *([tile, vocabulary % tile] if vocabulary > tile else [tile])]

    def prepare(self, lora: Any, *, checkpointing: bool) -> None:
        """Enable what TRL and the trainer do.

        Raises:
            EmlocError: transformers cannot recompute the model's activations.
        """
        from emloc_core.compat.transformers import recompute_activations
        from emloc_core.compat.trl import fuse_loss
        from emloc_core.model.recomputing import require_recomputation

        base = lora.get_base_model()
        if checkpointing:
            require_recomputation(base)
            lora.enable_input_require_grads()
            recompute_activations(base)
        fuse_loss(base)

    def loss(self, lora: Any) -> "tuple[torch.Tensor, Any]":
        """Return TRL's loss, with inputs and outputs."""
        from emloc_core.compat.trl import answer_loss
        from emloc_core.memory.fake import fake_inputs

        inputs = fake_inputs(**self.inputs)
        loss, output = answer_loss(lora, inputs)
        return loss, (inputs, output)

    def predict(self, model: Any, enter: "Callable[[torch.Tensor, str], None]") -> None:
        """Run the first forward of ``generate``: keys and values of the full prompt, logits of one token."""
        import torch

        from emloc_core.compat.transformers import has_own_cache
        from emloc_core.memory.fake import fake_inputs
        from emloc_core.memory.tracing import EnteredCache

        cache = None if has_own_cache(model) else EnteredCache(enter, model.config.get_text_config())
        inputs = fake_inputs(**self.inputs)
        inputs.setdefault("position_ids", torch.zeros_like(inputs["input_ids"]))  # generate passes them for every row
        model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)


def longest(
    config_file: Path, family: Family, config: Any, rows: Sequence[Row], length: int | None, limits: Limits
) -> Longest:
    """Return the tokens of the longest row, and the number and size of the images in the row with most pixels.

    Images that are cut into tiles count as their tiles, with None as size. For images of any size, the size is that of
    the largest (height and width in pixels), and the number is how many of it hold all of the row's pixels.

    Args:
        config_file, family, rows, length, limits: see :meth:`emloc_core.objective.Objective.longest`.
    """
    from emloc_core.data.tokenize import load_processing, tokenized

    tokens, most = 0, None
    for sample in tokenized(rows, load_processing(config_file.parent, family, rows), length, limits):
        tokens = max(tokens, len(sample.input_ids))
        pixels = sample.others.get("pixel_values")
        if pixels is not None and any(sample.completion_mask):  # a row that stage 2 does not drop
            most = max((sample.others, most or sample.others), key=lambda others: others["pixel_values"].numel())
    if most is None:
        return Longest(tokens)
    if "image_grid_thw" not in most:
        return Longest(tokens, len(most["pixel_values"]))
    patches = most["image_grid_thw"].prod(dim=1)
    _, height, width = most["image_grid_thw"][patches.argmax()].tolist()
    side = config.vision_config.patch_size
    return Longest(tokens, -(-int(patches.sum()) // int(patches.max())), (height * side, width * side))
