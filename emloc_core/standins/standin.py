"""What stands in for a weight: as it was fitted, and as it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch.nn import functional

from emloc_core.algorithms.correction import times


class StandIn:
    """What a Linear of the emulator computes with, as it is read: ``y = What x``, What being a product of matrices.

    Args:
        matrices: from the left; (m, k) and (k, n), say, or (m, n) alone.
    """

    def __init__(self, *matrices: torch.Tensor) -> None:
        self._matrices = matrices

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map (..., n) to (..., m), as the emulator's layer does; ``bias``, (m,), is added."""
        last, *others = self._matrices
        return functional.linear(reduce(functional.linear, reversed(others), x), last, bias)

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        """Return ``What Q``, (m, r), for columns Q, (n, r), in their dtype."""
        return reduce(lambda product, matrix: times(matrix, product), reversed(self._matrices), columns)

    def weight(self) -> torch.Tensor:
        """Return What, (m, n)."""
        return reduce(torch.matmul, self._matrices)

    def to(self, like: torch.Tensor) -> "StandIn":
        """Return it in the dtype, and on the device, of a tensor."""
        return StandIn(*(matrix.to(like) for matrix in self._matrices))


class Fitted(Protocol):
    """What was fitted to stand in for a weight, before it is packed: a dataclass with a field ``error``."""

    def relative_error(self) -> float:
        """Return ``||(W - What) X|| / ||W X||`` on the calibration inputs."""


@dataclass(frozen=True)
class Packed:
    """What was fitted, packed as it will be stored.

    Attributes:
        parts: by the names of the layer's parameters.
        shape: of the weight, (m, n).
        error: relative, of the outputs on the calibration inputs.
    """

    parts: Mapping[str, torch.Tensor]
    shape: tuple[int, int]
    error: float

    def relative_error(self) -> float:
        """Return the error."""
        return self.error
