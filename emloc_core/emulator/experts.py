"""Factors of fused experts, fitted to the tokens that the router sends to each.

An expert that fewer tokens reach than its activations have features is fitted to tokens of the whole layer besides, as
if they had been sent to it: as many as are missing, evenly spaced over all rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from emloc_core.algorithms.factorize import Factors
from emloc_core.algorithms.statistics import Gram
from emloc_core.emulator.ranks import ExpertsPlan, LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.standins.experts import activate, stacks


@dataclass(frozen=True)
class StackedFactors:
    """Factors of a stack of matrices, in the dtype of the base, on the CPU.

    Attributes:
        u: (E, m, k).
        v: (E, k, n).
        lost, energy: of the outputs on the calibration tokens of all experts: what the factors lose, and all.
    """

    u: torch.Tensor
    v: torch.Tensor
    lost: float
    energy: float

    def relative_error(self) -> float:
        """Return ``||(W - What) X|| / ||W X||`` over the experts, each on its tokens."""
        return (self.lost / self.energy) ** 0.5 if self.energy > 0 else 0.0


class ExpertStatistics:
    """The Grams of a layer's experts, gathered by a forward hook on their module.

    Args:
        experts: the module, whose weights are loaded when it is called.
        planned: its stacks that become factors.
        samples: number of rows that will pass through it.
        blame: returns the error for the user; takes an error and the path of a stack.
    """

    def __init__(
        self,
        experts: Any,
        planned: Sequence[ExpertsPlan],
        samples: int,
        device: torch.device,
        blame: Callable[[EmlocError, str], EmlocError],
    ) -> None:
        self.experts, self.planned, self._blame = experts, planned, blame
        self._up, self._down = stacks(experts)
        count = planned[0].experts
        sizes = {each.path: each.out_features if each.tap == "output" else each.in_features for each in planned}
        self._grams = {
            each.path: [Gram(each.tap, sizes[each.path], device=device) for _ in range(count)] for each in planned
        }
        #: An expert that fewer tokens reach needs others.
        self._enough = max(sizes.values())
        self._quota = -(-self._enough // max(1, samples))  # tokens of a row that are kept for such experts
        self._kept: list[torch.Tensor] = []
        self._tokens = [0] * count

    def hook(self, _module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        """Take in one call of the module, whose arguments are hidden states (tokens, n) and indices (tokens, top)."""
        hidden, index = args[0].detach(), args[1]
        self._kept.append(_spread(hidden, self._quota).clone())
        for expert in index.unique().tolist():
            self._add(expert, hidden[(index == expert).any(dim=-1)])

    def _add(self, expert: int, x: torch.Tensor) -> None:
        up = functional.linear(x, getattr(self.experts, self._up)[expert])
        inner = activate(self.experts, up)
        self._tokens[expert] += len(x)
        for each in self.planned:
            inputs = x if each.path.endswith(f".{self._up}") else inner
            if each.tap == "output":
                inputs = up if inputs is x else functional.linear(inner, getattr(self.experts, self._down)[expert])
            try:
                self._grams[each.path][expert].add(inputs)
            except EmlocError as error:
                raise self._blame(error, each.path) from None

    def factors(self, factorize: Callable[[LinearPlan, torch.Tensor, Gram], Factors]) -> dict[str, StackedFactors]:
        """Return the factors by path of the stack; none where no token reaches the layer.

        Args:
            factorize: takes the plan, an expert's matrix and its Gram.
        """
        if not any(self._tokens):
            return {}
        layer = torch.cat(self._kept)
        for expert, tokens in enumerate(self._tokens):
            if tokens < self._enough:
                self._add(expert, _spread(layer, self._enough - tokens))
        return {each.path: self._stack(each, factorize) for each in self.planned}

    def _stack(
        self, planned: ExpertsPlan, factorize: Callable[[LinearPlan, torch.Tensor, Gram], Factors]
    ) -> StackedFactors:
        weight = getattr(self.experts, planned.path.rpartition(".")[2])
        (count, m, n), k = weight.shape, planned.rank or 0
        u, v = (torch.empty(shape, dtype=weight.dtype) for shape in ((count, m, k), (count, k, n)))
        lost = energy = 0.0
        for expert, gram in enumerate(self._grams[planned.path]):
            found = factorize(planned, weight[expert], gram)
            u[expert], v[expert] = found.u, found.v
            lost, energy = lost + float(found.spectrum[k:].sum()), energy + float(found.spectrum.sum())
        return StackedFactors(u, v, lost, energy)


def _spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return so many of the rows, (t, n), evenly spaced; all, if there are fewer."""
    if count >= len(rows):
        return rows
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]
