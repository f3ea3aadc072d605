"""TRL: the loss, of which only the tokens that count are projected, and the tiles that its memory is planned by."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emloc_core.compat.private import patched, private


@contextmanager
def counted_tokens_alone() -> Iterator[None]:
    """Have TRL project only the tokens that count in the loss on the vocabulary.

    It does so where it has Triton; elsewhere it projects all tokens, so as not to change shapes, and drops the others:
    in rows of prompt and completion most of them, for a third of a small model's step.
    """
    with patched("trl", "trl.trainer.utils", _use_triton=lambda *_: True):
        yield


def fuse_loss(model: Any) -> None:
    """Have a model's forward take the argument ``fused_lm_head``, and return the log-probabilities of its labels.

    As SFTTrainer does it, with what it needs of the loss.
    """
    with private("trl"):
        from trl.trainer.utils import add_fused_lm_head
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def tile_width() -> int:
    """Return how many words of the vocabulary TRL's loss projects at a time."""
    with private("trl"):
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    return int(_CHUNKED_LOGPROB_CHUNK_SIZE)


@contextmanager
def tiles_in_place() -> Iterator[None]:
    """Have TRL's loss allocate the tiles of logits alone, as where a Triton kernel reduces each in place: on a GPU."""

    def in_place(*_: Any, **__: Any) -> None:
        return None

    kernels = "trl.kernels.chunked_logprob"
    with patched("trl", kernels, _forward_tile=in_place, _backward_tile=in_place, _addmm_fp32=in_place):
        yield
