"""Refuses models that cannot recompute their activations in the backward pass (gradient checkpointing)."""

from torch import nn

from emloc_core.errors import EmlocError


def require_recomputation(model: nn.Module) -> None:
    """Check that transformers can recompute the activations of a model.

    Raises:
        EmlocError: its class does not support that.
    """
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise EmlocError(
            f"Transformers cannot recompute the activations of a {type(model).__name__}.",
            "Give --no-gradient-checkpointing, which takes more memory.",
            code="unsupported",
        )
