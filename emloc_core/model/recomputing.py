"""Refuses models that cannot recompute their activations in the backward pass (gradient checkpointing)."""

from torch import nn

from emloc_core.errors import EmlocError


def require_recomputation(model: nn.Module) -> None:
    """Refuse a model whose class does not support that transformers recomputes its activations."""
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise EmlocError(
            f"Transformers cannot recompute the activations of a {type(model).__name__}.",
            "Give --no-gradient-checkpointing, which takes more memory.",
            code="unsupported",
        )
