"""TRL: losses of the tokens that count, the tiles that their memory is planned by, and datasets that are tokenized."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from emloc_core.compat.private import patched, private


def has_tiles() -> bool:
    """Return whether TRL's losses project on the vocabulary in tiles (since 1.15), for texts and preferences alike.

    Without, they are of whole logits: :func:`fuse_loss` and the widths of tiles are left out, and plans count all.
    """
    from trl.trainer import utils

    return hasattr(utils, "add_fused_lm_head")


@contextmanager
def counted_tokens_alone() -> Iterator[None]:
    """Have TRL project only the tokens that count in the loss on the vocabulary.

    It does so where it has Triton; elsewhere it projects all tokens, so as not to change shapes, and drops the others:
    in rows of prompt and completion most of them, for a third of a small model's step.
    """
    with patched("trl", "trl.trainer.utils", **({"_use_triton": lambda *_: True} if has_tiles() else {})):
        yield


def fuse_loss(model: Any) -> None:
    """Have a model's forward take the argument ``fused_lm_head``, and return the log-probabilities of its labels.

    As SFTTrainer does it, with the outputs that its loss needs. A TRL without tiles leaves the forward as it is.
    """
    if not has_tiles():
        return
    with private("trl"):
        from trl.trainer.utils import add_fused_lm_head
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def answer_loss(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return TRL's loss of all tokens of a model that went through :func:`fuse_loss`, and the model's output."""
    ids = inputs["input_ids"]
    if not has_tiles():
        output = model(**inputs, labels=ids)
        return output.loss, output
    output = model(**inputs, labels=ids, fused_lm_head=True)
    return -output.log_probs.sum() / ids.numel(), output


def tile_width() -> int | None:
    """Return how many words of the vocabulary TRL's loss projects at a time; None: all."""
    if not has_tiles():
        return None
    with private("trl"):
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    return int(_CHUNKED_LOGPROB_CHUNK_SIZE)


@contextmanager
def tiles_of(words: int | None) -> Iterator[None]:
    """Have TRL's loss project on so many words of the vocabulary at a time; None: on as many as it does by itself.

    Where the output layer is packed, the words' rows are unpacked while the previous tile's are still there.
    """
    with patched(
        "trl", "trl.trainer.utils", **({"_CHUNKED_LOGPROB_CHUNK_SIZE": words} if words and has_tiles() else {})
    ):
        yield


@contextmanager
def tiles_in_place() -> Iterator[None]:
    """Have TRL's loss allocate the tiles of logits alone, as where a Triton kernel reduces each in place: on a GPU."""

    def in_place(*_: Any, **__: Any) -> None:
        return None

    kernels = "trl.kernels.chunked_logprob"
    tiles = dict.fromkeys(("_forward_tile", "_backward_tile", "_addmm_fp32"), in_place) if has_tiles() else {}
    with patched("trl", kernels, **tiles):
        yield


def mean_log_probs(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Return the mean log-probability per token of answers, (rows), of a model in ``DPOTrainer``.

    Only the tokens that count are projected on the vocabulary, as in its own loss; all where it has no tiles.

    Args:
        inputs: its collator's output; ``completion_mask`` says which tokens count.
    """
    mask = inputs["completion_mask"]
    arguments = {name: value for name, value in inputs.items() if name != "completion_mask"}
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    if has_tiles():
        with private("trl"):
            log_probs = model(**arguments, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    else:
        from torch.nn.functional import cross_entropy

        logits = model(**arguments, use_cache=False).logits[:, :-1].float()
        log_probs = -cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return log_probs.sum(1) / mask[:, 1:].sum(1)


def note(trainer: Any, **values: Any) -> None:
    """Have a trainer of TRL's log the mean of values, by name, with its next entry."""
    with private("trl"):
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, value in values.items():
        metrics[name].append(trainer.accelerator.gather(value.detach()).mean().item())


class TokenizedDataset:
    """For subclasses of TRL's trainers for preferences, which would tokenize their datasets row by row."""

    def prepared(self, dataset: Any, args: Any) -> Any:  # noqa: ARG002
        """Return the dataset to train on: by default, the given one."""
        return dataset

    def _prepare_dataset(self, dataset: Any, _processing: Any, args: Any, _name: str) -> Any:
        return self.prepared(dataset, args)
