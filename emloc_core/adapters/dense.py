"""Embeddings and output layers that an adapter replaces, whole or some of their rows.

PEFT trains them where a config has ``modules_to_save`` or ``trainable_token_indices``. An emulator has its base's own,
so the trained ones are valid on the base.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from emloc_core.errors import EmlocError
from emloc_core.model.skeleton import Skeleton
from emloc_core.standins.vocabulary import vocabulary_layers

#: Ends of PEFT's keys of a replaced weight, and of replaced rows of one.
WEIGHT, ROWS = ".weight", ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Replacement:
    """The new weight of a module, or some of its rows.

    Attributes:
        weight: (rows, features).
        indices: which rows these are; None: all.
    """

    weight: torch.Tensor
    indices: tuple[int, ...] | None = None

    def applied(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Return rows of the base's weight, with the replaced ones among them as new.

        Args:
            weight: (rows, features), from row ``first`` of the base's on.
        """
        if self.indices is None:
            return self.weight[first : first + len(weight)].to(weight.device, weight.dtype)
        replaced = weight.clone()
        for row, index in zip(self.weight, self.indices, strict=True):
            if first <= index < first + len(weight):
                replaced[index - first] = row
        return replaced


def replacements(tensors: Mapping[str, torch.Tensor], tokens: Any) -> dict[str, Replacement]:
    """Return what an adapter replaces, by path of the module.

    Args:
        tensors: an adapter's tensors that belong to no LoRA, by their keys without PEFT's prefix.
        tokens: ``trainable_token_indices`` of its config: of the embeddings, or by the end of a path.

    Raises:
        EmlocError: a tensor is no such replacement, or has another number of rows than the config says.
    """
    by_path = {}
    for key, tensor in tensors.items():
        rows = key.endswith(ROWS)
        path = key.removesuffix(ROWS) if rows else key.removesuffix(WEIGHT)
        indices = _indices(path, tokens) if rows else None
        if tensor.ndim != 2 or path == key or (rows and len(indices or ()) != len(tensor)):
            raise EmlocError(
                f"The adapter holds {key}, which is neither part of a LoRA on a Linear nor declared in its config.",
                "Train an ordinary LoRA on Linears only.",
                code="unsupported",
            )
        by_path[path] = Replacement(tensor, indices)
    return by_path


def _indices(path: str, tokens: Any) -> tuple[int, ...]:
    by_name = tokens if isinstance(tokens, Mapping) else {"": tokens}
    matches: list[Any] = [rows for name, rows in by_name.items() if not name or f".{path}".endswith(f".{name}")]
    return tuple(matches[0] or ()) if matches else ()


def require_dense(replaced: Mapping[str, Replacement], model: nn.Module) -> None:
    """Refuse replacements of anything but the embeddings and the output layer, or of other shapes."""
    dense = vocabulary_layers(model)
    for path, new in replaced.items():
        if path not in dense:
            raise EmlocError(
                f"The adapter replaces {path}, which was a different module in training.",
                f"Train a LoRA on it; only {' and '.join(dense)} can be trained themselves.",
                code="unsupported",
            )
        weight: Any = dense[path].weight
        shape = tuple(weight.shape)
        fits = tuple(new.weight.shape) == shape if new.indices is None else new.weight.shape[1] == shape[1]
        if not fits or any(index >= shape[0] for index in new.indices or ()):
            raise EmlocError(
                f"The adapter's {path} does not fit a weight of shape {shape}.",
                "The adapter belongs to another model: give the base that it was trained for.",
                code="mismatch",
            )


def replaced_weights(replaced: Mapping[str, Replacement], skeleton: Skeleton) -> dict[str, Replacement]:
    """Return replacements by parameter; rows of tied embeddings are replaced in the output layer too, as in PEFT."""
    by_parameter = {f"{path}.weight": new for path, new in replaced.items()}
    for name, source in skeleton.tied.items():
        if source in by_parameter and by_parameter[source].indices is not None:
            by_parameter.setdefault(name, by_parameter[source])
    return by_parameter
