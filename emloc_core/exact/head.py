"""The loss of hidden states, over the vocabulary in pieces, so that only a few logits exist at a time.

Only tokens that count are projected. The gradient of each piece is taken at once, while its logits are there, so that
the projection is read once and nothing of it is recomputed (as in Liger Kernel's fused linear cross entropy,
arXiv 2410.10989).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from emloc_core.model.hooks import forwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Logits at a time, by the type of device; in fp32, with their gradient, eight bytes each. A GPU needs more tokens
#: each time it reads the projection.
PIECES = {"cpu": 1 << 24, "cuda": 1 << 25}
_IGNORED = -100


def shifted_labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the label that every position of a batch is to predict, (rows, T); -100 where it does not count."""
    if "shift_labels" in batch:
        return batch["shift_labels"]
    return nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=_IGNORED)


def count_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Return how many tokens of a batch count in its loss."""
    return int((shifted_labels(batch) != _IGNORED).sum())


class Head:
    """A model's head and loss over its backbone's hidden states: the model's own code, on few of them at a time.

    Args:
        model: a causal language model of transformers, or one for images and text; its ``forward`` may be patched.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        from transformers import PreTrainedModel

        self.model, self.backbone = model, model.base_model
        #: The backbone, and models in it: some pass over the backbone, and call the decoder that it holds.
        self._models = [module for module in self.backbone.modules() if isinstance(module, PreTrainedModel)]
        self._vocabulary: int = model.config.get_text_config().vocab_size

    def loss(
        self, outputs: Any, labels: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the summed cross entropy of labels, times ``weight``, with its gradient; see :func:`with_gradient`.

        Args:
            outputs: the backbone's outputs, with ``last_hidden_state``, (rows, T, d).
            labels: see :func:`shifted_labels`.
            weight: weight of every token.

        Returns:
            The hidden states of the tokens that count, (n, d); the gradient, likewise; the loss, ().
        """
        counts = labels != _IGNORED
        hidden, targets = outputs.last_hidden_state[counts], labels[counts]
        total, gradients = torch.zeros((), device=hidden.device), [hidden.detach()[:0]]
        size = max(1, PIECES.get(hidden.device.type, PIECES["cuda"]) // self._vocabulary)
        for piece, target in zip(hidden.detach().split(size), targets.split(size), strict=True):
            piece.requires_grad_()
            logits = self._logits(outputs, piece[None])[0]
            loss = weight * nn.functional.cross_entropy(logits.float(), target, reduction="sum")
            loss.backward()
            total += loss.detach()
            gradients.append(piece.grad)
        return hidden, torch.cat(gradients), total

    def _logits(self, outputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the model's own forward makes of hidden states, (1, n, d): logits, (1, n, vocabulary)."""
        backbone_outputs = type(outputs)(last_hidden_state=hidden)
        with forwards([(module, lambda *_args, **_kwargs: backbone_outputs) for module in self._models]):
            logits: torch.Tensor = type(self.model).forward(self.model, inputs_embeds=hidden, use_cache=False).logits
        return logits


def with_gradient(hidden: torch.Tensor, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return ``value`` as computed from ``hidden``, with a backward pass that gives ``hidden`` a known gradient."""
    return _Known.apply(hidden, gradient, value)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _hidden: torch.Tensor, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None
