"""Which matrices of the vocabulary an emulator has packed, and packing those that no rows are needed for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from emloc_core.algorithms.products import by_onednn
from emloc_core.algorithms.statistics import Gram
from emloc_core.errors import EmlocError
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.skeleton import Skeleton
from emloc_core.model.streaming import Stream
from emloc_core.standins.standin import Packed
from emloc_core.standins.vocabulary import PACKINGS, packed_embedding

#: How an output layer is packed that has a matrix of its own; embeddings; and both, where they share one.
HEAD, EMBEDDING, SHARED = "4-bit", "8-bit", "8-bit"


@dataclass(frozen=True)
class VocabularyPlan:
    """What happens to a matrix of the vocabulary.

    Attributes:
        path: of the layer that it is stored for.
        layers: paths of all layers that have it: two where they are tied.
        packing: how it is packed; a key of :data:`~emloc_core.standins.vocabulary.PACKINGS`.
        rows, features: its shape.
    """

    path: str
    layers: tuple[str, ...]
    packing: str
    rows: int
    features: int

    @property
    def is_fitted(self) -> bool:
        """Whether it is fitted to what it is multiplied by, where rows are there."""
        return PACKINGS[self.packing].fitted and len(self.layers) == 1

    @property
    def numbers(self) -> int:
        """How many numbers it is, dense."""
        return self.rows * self.features

    def saved(self, dtype: torch.dtype) -> int:
        """Return the bytes that packing saves of a matrix of this dtype."""
        return self.numbers * dtype.itemsize - PACKINGS[self.packing].nbytes(self.rows, self.features, dtype)

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
    named = [id(each) for _, each in model.named_parameters(remove_duplicate=False)]
    plans = []
    for weight, of in layers.items():
        if any(map(keeps, of)) or named.count(weight) != len(of):  # another layer has it too
            continue
        first = model.get_submodule(of[0])
        packing = SHARED if len(of) > 1 else EMBEDDING if isinstance(first, nn.Embedding) else HEAD
        plans.append(VocabularyPlan(of[0], tuple(of), packing, *first.weight.shape))
    return tuple(plans)


def packings(plans: Sequence[VocabularyPlan]) -> dict[str, str]:
    """Return how each layer is packed, by its path."""
    return {path: plan.packing for plan in plans for path in plan.layers}


def vocabulary_layers(model: Any) -> dict[str, Any]:
    """Return the token embeddings and the output layer of a model by their paths, in this order."""
    asked = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(module)]: module for module in asked if id(module) in paths}


class Matrices(Protocol):
    """Holds packed matrices of the vocabulary, by the path of their layer."""

    skeleton: Skeleton

    def is_written(self, unit: str) -> bool:
        """Return whether a matrix has been written."""

    def write(self, unit: str, fitted: Mapping[str, Any], sensitivities: Mapping[str, float]) -> None:
        """Write a matrix."""

    def matrix(self, path: str) -> Mapping[str, torch.Tensor]:
        """Return its parts."""


def pack_vocabulary(store: Matrices, plans: Sequence[VocabularyPlan]) -> None:
    """Pack matrices as they are, one at a time; those that are written are left.

    Raises:
        EmlocError: one holds NaN or Inf.
    """
    for plan in plans:
        if store.is_written(plan.path):
            continue
        name = f"{plan.path}.weight"
        with store.skeleton.parameters([name]) as loaded:
            store.write(plan.path, {plan.path: packed(store.skeleton, plan, loaded[name])}, {})


@by_onednn()
def packed(
    skeleton: Skeleton,
    plan: VocabularyPlan,
    weight: torch.Tensor,
    gram: Gram | None = None,
    target: torch.Tensor | None = None,
) -> Packed:
    """Return a matrix packed.

    Args:
        skeleton: the base.
        plan: of the matrix.
        weight: (rows, features).
        gram, target: see :meth:`~emloc_core.standins.vocabulary.Packing.pack`.

    Raises:
        EmlocError: the weight holds NaN or Inf.
    """
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise EmlocError(
            f"{plan.path}.weight in {skeleton.checkpoint.directory} holds NaN or Inf.",
            "Download or copy the model again.",
            code="not-finite",
        )
    return PACKINGS[plan.packing].pack(weight, gram, target)


@contextmanager
def looking_up(stream: Stream, plan: VocabularyPlan, parts: Mapping[str, torch.Tensor], rows: int) -> Iterator[None]:
    """Let the samples from index ``rows`` on, those of the emulator, look their tokens up in packed embeddings."""
    module: Any = stream.skeleton.model.get_submodule(plan.path)
    other = packed_embedding(module, plan.packing, parts)

    def look_up(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> Any:
        return None if stream.sample < rows else other.forward(*args)

    with forward_hooks([(module, look_up)]):  # a unit's own forward has begun
        yield
