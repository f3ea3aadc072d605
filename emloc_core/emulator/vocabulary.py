"""Which matrices of the vocabulary an emulator has packed: those of output layer and token embeddings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from emloc_core.standins.vocabulary import PACKINGS, vocabulary_layers

#: How an output layer is packed that has a matrix of its own; embeddings; and both, where they share one.
HEAD, EMBEDDING, SHARED = "4-bit", "8-bit", "8-bit"


@dataclass(frozen=True)
class VocabularyPlan:
    """What happens to a matrix of the vocabulary.

    Attributes:
        path: of the layer that it is stored for.
        layers: paths of all layers that have it: two where they are tied.
        packing: how it is packed; a key of :data:`~emloc_core.standins.vocabulary.PACKINGS`.
    """

    path: str
    layers: tuple[str, ...]
    packing: str
    rows: int
    features: int

    @property
    def is_fitted(self) -> bool:
        """Whether it is fitted to its inputs, where there are rows."""
        return PACKINGS[self.packing].fitted and len(self.layers) == 1

    @property
    def numbers(self) -> int:
        """How many numbers it is, dense."""
        return self.rows * self.features

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return its bytes, packed, in an emulator of a base of this dtype."""
        return PACKINGS[self.packing].nbytes(self.rows, self.features, dtype)

    def describe(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**vars(self), "layers": list(self.layers)}

    def __str__(self) -> str:
        return (
            f"{' and '.join(self.layers)} {self.rows} x {self.features} -> {self.packing.replace('-', ' ')}s a number"
        )


def find_vocabulary(model: Any, keeps: Callable[[str], Any]) -> tuple[VocabularyPlan, ...]:
    """Return the matrices of output layer and token embeddings that can be packed.

    Args:
        model: the model; meta tensors suffice.
        keeps: takes a path, and returns whether the layer there stays dense.
    """
    layers: dict[int, list[str]] = {}
    for path, module in vocabulary_layers(model).items():
        # An outline's classes have the names of the model's own.
        if isinstance(module, nn.Embedding) or type(module).__name__ == nn.Linear.__name__:
            layers.setdefault(id(module.weight), []).append(path)
    named = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    plans = []
    for weight, paths in layers.items():
        if any(map(keeps, paths)) or named.count(weight) != len(paths):  # another layer has it too
            continue
        first = model.get_submodule(paths[0])
        packing = SHARED if len(paths) > 1 else EMBEDDING if isinstance(first, nn.Embedding) else HEAD
        plans.append(VocabularyPlan(paths[0], tuple(paths), packing, *first.weight.shape))
    return tuple(plans)


def packings(plans: Sequence[VocabularyPlan]) -> dict[str, str]:
    """Return how each layer is packed, by its path."""
    return {path: plan.packing for plan in plans for path in plan.layers}
