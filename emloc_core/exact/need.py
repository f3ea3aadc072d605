"""What an exact step needs, by formula, from shapes alone (``docs/memory.md``)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from emloc_core.exact.head import PIECE

#: Every Linear's input and output are there while a block is recomputed and gone back through: the tensor, and its
#: gradient or what a norm or an activation function makes of it.
_COPIES = 2


def step_need(
    model: PreTrainedModel, units: Sequence[str], blocks: Sequence[str], tokens: int, at_once: int, dtype: torch.dtype
) -> dict[str, int]:
    """Return the bytes of an exact step by term, without the LoRA and its optimiser.

    Args:
        model: on the meta device.
        units: paths of all units.
        blocks: paths of the blocks that every token passes through: the language model's.
        tokens: of all micro-batches.
        at_once: of the largest micro-batch.
        dtype: of the hidden states.

    Returns:
        - weights: the unit in use and the next one, in the largest pair of neighbours.
        - boundaries: the hidden states before every block and behind the last, of all tokens, and their gradient.
        - activations: those of one block, of one micro-batch.
        - logits: one piece of them, in fp32, with its gradient.
    """
    config: Any = model.config.get_text_config()
    sizes = [sum(p.numel() * p.itemsize for p in model.get_submodule(unit).parameters()) for unit in units]
    widths = [
        sum(m.in_features + m.out_features for m in model.get_submodule(block).modules() if isinstance(m, nn.Linear))
        for block in blocks
    ]
    return {
        "weights": max(a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True)),
        "boundaries": tokens * (len(blocks) + 2) * config.hidden_size * dtype.itemsize,
        "activations": _COPIES * at_once * max(widths) * dtype.itemsize,
        "logits": 8 * min(PIECE, at_once * config.vocab_size),
    }
