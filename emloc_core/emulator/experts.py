"""Stand-ins for fused experts, fitted to the tokens that the router sends to each.

An expert that fewer tokens reach than its activations have features is fitted to tokens of the whole layer besides, as
if they had been sent to it: as many as are missing, evenly spaced over all rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from emloc_core.algorithms.statistics import Gram
from emloc_core.emulator.ranks import ExpertsPlan, LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.standins.experts import activate, matrices, stacks, with_bias
from emloc_core.standins.standin import Fitted


@dataclass(frozen=True)
class Stacked:
    """What stands in for a stack of matrices.

    Attributes:
        parts: those of every matrix by their names, with a leading E, on the CPU.
        error: the root mean square over the experts of ``||(W - What) X|| / ||W X||``, each on its tokens.
    """

    parts: dict[str, torch.Tensor]
    error: float

    def relative_error(self) -> float:
        """Return the error."""
        return self.error


def stacked(fitted: Iterable[Fitted], pack: Callable[[Fitted], Mapping[str, torch.Tensor]]) -> Stacked:
    """Return what was fitted for the matrices of a stack, one by one, packed."""
    packed, errors = [], []
    for each in fitted:
        packed.append(pack(each))
        errors.append(each.relative_error())
    parts = {name: torch.stack([of[name] for of in packed]) for name in packed[0]}
    return Stacked(parts, (sum(error**2 for error in errors) / len(errors)) ** 0.5)


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
        up = linear(x, matrices(self.experts, self._up)[expert])
        inner = activate(self.experts, with_bias(self.experts, self._up, up, expert))
        self._tokens[expert] += len(x)
        for each in self.planned:
            inputs = x if each.path.endswith(f".{self._up}") else inner
            if each.tap == "output":
                inputs = up if inputs is x else linear(inner, matrices(self.experts, self._down)[expert])
            try:
                self._grams[each.path][expert].add(inputs)
            except EmlocError as error:
                raise self._blame(error, each.path) from None

    def fitted(
        self,
        fit: Callable[[LinearPlan, torch.Tensor, Gram], Fitted],
        pack: Callable[[Fitted], Mapping[str, torch.Tensor]],
    ) -> dict[str, Stacked]:
        """Return what stands in for the stacks, by path; nothing where no token reaches the layer.

        Args:
            fit: takes the plan, an expert's matrix and its Gram.
            pack: takes what was fitted for a matrix.
        """
        if not any(self._tokens):
            return {}
        layer = torch.cat(self._kept)
        for expert, tokens in enumerate(self._tokens):
            if tokens < self._enough:
                self._add(expert, _spread(layer, self._enough - tokens))
        return {each.path: stacked(self._each(each, fit), pack) for each in self.planned}

    def _each(self, planned: ExpertsPlan, fit: Callable[[LinearPlan, torch.Tensor, Gram], Fitted]) -> Iterator[Fitted]:
        name = planned.name
        for expert, gram in enumerate(self._grams[planned.path]):
            yield fit(planned, matrices(self.experts, name)[expert], gram)


def _spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return so many of the rows, (t, n), evenly spaced; all, if there are fewer."""
    if count >= len(rows):
        return rows
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]
