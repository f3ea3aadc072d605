"""Stand-ins for fused experts, each fitted to the tokens that the base's router sends to it.

The tokens of a layer are kept in a file, and experts are fitted one by one, to those of theirs: their matrices have
statistics of their own, which for all experts at once would take more than the layer. An expert that fewer tokens reach
than its activations have features is fitted to tokens of the whole layer besides, as if they had been sent to it: as
many as are missing, evenly spaced over all rows.

Where errors are propagated, every token has an input in the base and one in the emulator. An expert has an output for
either, wherever the token is sent; it is fitted to the tokens that the base sends to it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from emloc_core.algorithms.statistics import ROWS, Gram, Side
from emloc_core.emulator.propagation import PairedMoments
from emloc_core.emulator.ranks import TOKENS_AT_ONCE, ExpertsPlan, LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.files.scratch import ScratchTensors
from emloc_core.processes.heap import give_back
from emloc_core.standins import Format
from emloc_core.standins.experts import StandInExperts, activate, matrices, stacks, with_bias
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


class Stack:
    """Collects the packed matrices of a stack."""

    def __init__(self, count: int) -> None:
        self._parts: dict[str, torch.Tensor] = {}
        self._count, self._squared, self._done = count, 0.0, 0

    def add(self, packed: Mapping[str, torch.Tensor], error: float) -> None:
        """Take in the parts of the next matrix, with its relative error."""
        for name, part in packed.items():
            self._parts.setdefault(name, part.new_empty(self._count, *part.shape))[self._done] = part
        self._done, self._squared = self._done + 1, self._squared + error**2

    def stacked(self) -> Stacked:
        """Return the complete stack."""
        return Stacked(self._parts, (self._squared / self._count) ** 0.5)


class ExpertFitting:
    """Keeps the tokens that pass through the experts of a layer, and fits what stands in for their stacks.

    Args:
        fit: takes the plan, a matrix and the Gram of its inputs or outputs; by the format.
        directory: for a file of the tokens; None: they stay in memory.
    """

    def __init__(
        self,
        experts: Any,
        planned: Sequence[ExpertsPlan],
        format: Format,
        fit: Callable[[LinearPlan, torch.Tensor, Gram], Fitted],
        directory: Path | None = None,
    ) -> None:
        self._experts, self._planned = experts, {stack.name: stack for stack in planned}
        self._format, self._fit = format, fit
        sizes = (stack.out_features if stack.tap == "output" else stack.in_features for stack in planned)
        #: An expert that fewer tokens reach needs others.
        self._enough = max(sizes)
        self._tokens = ScratchTensors(directory)  # by row: (streams, tokens, n)
        self._index: list[torch.Tensor] = []
        self._stacks = {name: Stack(stack.experts) for name, stack in self._planned.items()}

    def add(self, *inputs: torch.Tensor) -> None:
        """Keep the tokens of a row.

        Args:
            inputs: of the experts in the base, (tokens, n), and the experts that it sends them to, (tokens, top); where
                errors are propagated, also the same in the emulator, whose choice of experts does not count.

        Raises:
            EmlocError: they hold NaN or Inf; the caller adds the row.
        """
        tokens = torch.stack(inputs[::2])
        if not bool(torch.isfinite(tokens).all()):
            raise EmlocError("NaN or Inf among the activations", code="not-finite")
        self._tokens[len(self._index)] = tokens
        self._index.append(inputs[1].detach().clone())

    def fit(self) -> dict[str, Stacked]:
        """Return what stands in for the stacks, by path; nothing where no token reaches the layer.

        Raises:
            EmlocError: what an expert computes is NaN or Inf.
        """
        if not self._index:
            return {}
        for expert, streams in enumerate(self._sent()):
            self._fit_expert(expert, streams.unbind())
            give_back()
        return {stack.path: self._stacks[name].stacked() for name, stack in self._planned.items()}

    def _fit_expert(self, expert: int, inputs: Sequence[torch.Tensor]) -> None:
        """Fit an expert's matrices to its inputs, in the base and perhaps in the emulator."""
        up, down = stacks(self._experts)
        products = zip(self._fit_matrix(up, expert, inputs), inputs, strict=True)
        outputs = (with_bias(self._experts, up, times(x), expert) for times, x in products)
        self._fit_matrix(down, expert, [activate(self._experts, output) for output in outputs])

    def _sent(self) -> Iterator[torch.Tensor]:
        """Yield the tokens that each expert is fitted to, (streams, tokens, n).

        They are read for several experts at once, since each time every token of the layer is read.
        """
        index = torch.cat(self._index)
        positions = [self._positions(index, expert) for expert in range(self._experts.num_experts)]
        row = self._tokens[0]
        a_token = len(row) * row.shape[-1] * row.itemsize
        while positions:
            sizes = accumulate(len(part) * a_token for part in positions)
            count = max(1, sum(size <= TOKENS_AT_ONCE for size in sizes))
            yield from self._read(positions[:count])
            del positions[:count]

    def _positions(self, index: torch.Tensor, expert: int) -> torch.Tensor:
        """Return the positions of an expert's tokens among all."""
        positions = (index == expert).any(dim=-1).nonzero()[:, 0]
        if len(positions) < self._enough:
            positions = torch.cat([positions, _spread(len(index), self._enough - len(positions)).to(positions)])
        return positions

    def _read(self, positions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tokens at these positions, for each of several experts."""
        gathered: list[torch.Tensor] = []
        for row, (start, stop) in enumerate(pairwise(accumulate(map(len, self._index), initial=0))):
            tokens = self._tokens[row]
            gathered = gathered or [tokens.new_empty(len(tokens), len(part), tokens.shape[-1]) for part in positions]
            for own, part in zip(gathered, positions, strict=True):
                inside = ((part >= start) & (part < stop)).nonzero()[:, 0]
                own[:, inside] = tokens[:, part[inside] - start]
        return gathered

    def settle(self) -> tuple[dict[str, Stacked], dict[str, Callable[..., torch.Tensor]]]:
        """Return what stands in for the stacks, and what computes with it in the emulator, by path of the module."""
        planned, fitted = list(self._planned.values()), self.fit()
        parts = {path: stack.parts for path, stack in fitted.items()}
        return fitted, {planned[0].owner: emulated(self._experts, planned, self._format, parts)}

    def _fit_matrix(self, name: str, expert: int, inputs: Sequence[torch.Tensor]) -> list[Callable[..., torch.Tensor]]:
        """Fit a matrix to its inputs, in the base and perhaps in the emulator; return what multiplies by it there."""
        weight = matrices(self._experts, name)[expert]
        base = partial(linear, weight=weight)
        planned = self._planned.get(name)
        if planned is None:
            return [base for _ in inputs]
        try:
            target, gram = _statistics(weight, planned.tap, self._format.narrow, *inputs)
        except EmlocError as error:
            raise EmlocError(
                f"{error} of expert {expert} of {planned.owner}.",
                "Check the weights up to this layer; a half-precision model may overflow there.",
                code=error.code,
            ) from None
        fitted = self._fit(planned, target, gram)
        packed = self._format.pack(fitted, weight.dtype)
        self._stacks[name].add(packed, fitted.relative_error())
        parts = [packed[part].to(weight.device) for part in self._format.names()]
        return [base, *(self._format.read(parts, planned.shape, weight.dtype) for _ in inputs[1:])]


def emulated(
    experts: Any, planned: Sequence[ExpertsPlan], format: Format, parts: Mapping[str, Mapping[str, torch.Tensor]]
) -> StandInExperts:
    """Return what computes as the experts do in the emulator, with the parts of its stacks, by their paths."""
    stand_in = StandInExperts(experts, format.layer, {stack.name: stack.rank for stack in planned})
    for stack in planned:
        device = experts.get_parameter(stack.name).device
        stand_in.load(stack.name, {name: part.to(device) for name, part in parts[stack.path].items()})
    return stand_in


def _statistics(
    weight: torch.Tensor, side: Side, narrow: bool, x: torch.Tensor, emulated: torch.Tensor | None = None
) -> tuple[torch.Tensor, Gram]:
    """Return what to fit, the weight or a target with its outputs on the emulator's inputs, and the Gram to fit to."""
    if emulated is not None:
        moments = PairedMoments([weight], narrow=narrow)
        for pair in zip(x.split(ROWS), emulated.split(ROWS), strict=True):
            moments.add(*pair)
        (target,) = moments.fit()
        return target, moments.gram_for(target, side)
    gram = Gram(side, len(weight) if side == "output" else weight.shape[1], device=weight.device)
    for rows in x.split(ROWS):
        gram.add(linear(rows, weight) if side == "output" else rows)
    return weight, gram


def _spread(rows: int, count: int) -> torch.Tensor:
    """Return the indices of so many rows, evenly spaced; all, if there are fewer."""
    return torch.arange(min(count, rows)) * rows // max(1, min(count, rows))
