"""Stand-ins for fused experts, each fitted to the tokens that the base's router sends to it.

The tokens of a layer are kept in a file, and experts are fitted one by one, to those of theirs: their matrices have
statistics of their own, which for all experts at once would take more than the layer. An expert that fewer tokens reach
than its activations have features is fitted to tokens of the whole layer besides, as if they had been sent to it: as
many as are missing, evenly spaced over all rows.

Where errors are propagated, every token has an input in the base and one in the emulator. What an expert makes of
either is defined wherever the token is sent; it is fitted to those that the base sends to it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from emloc_core.algorithms.statistics import ROWS, Gram
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
    """The packed matrices of a stack, as they come."""

    def __init__(self, count: int) -> None:
        self._parts: dict[str, torch.Tensor] = {}
        self._count, self._squared, self._done = count, 0.0, 0

    def add(self, packed: Mapping[str, torch.Tensor], error: float) -> None:
        """Take in the parts of the next matrix, with its relative error."""
        for name, part in packed.items():
            self._parts.setdefault(name, part.new_empty(self._count, *part.shape))[self._done] = part
        self._done, self._squared = self._done + 1, self._squared + error**2

    def whole(self) -> Stacked:
        """Return all of them."""
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
        self._experts, self._planned = experts, {each.name: each for each in planned}
        self._format, self._fit = format, fit
        sizes = (each.out_features if each.tap == "output" else each.in_features for each in planned)
        #: An expert that fewer tokens reach needs others.
        self._enough = max(sizes)
        self._tokens = ScratchTensors(directory)  # by row: (streams, tokens, n)
        self._index: list[torch.Tensor] = []
        self._stacks = {name: Stack(each.experts) for name, each in self._planned.items()}

    def add(self, *given: torch.Tensor) -> None:
        """Keep the tokens of a row.

        Args:
            given: what the experts are given in the base, (tokens, n), and the experts that it sends them to,
                (tokens, top); and where errors are propagated the same in the emulator, whose choices do not count.

        Raises:
            EmlocError: they hold NaN or Inf; the caller adds the row.
        """
        tokens = torch.stack(given[::2])
        if not bool(torch.isfinite(tokens).all()):
            raise EmlocError("NaN or Inf among the activations", code="not-finite")
        self._tokens[len(self._index)] = tokens
        self._index.append(given[1].detach().clone())

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
        return {each.path: self._stacks[name].whole() for name, each in self._planned.items()}

    def _fit_expert(self, expert: int, inputs: Sequence[torch.Tensor]) -> None:
        """Fit an expert's matrices to its inputs, in the base and perhaps in the emulator."""
        up, down = stacks(self._experts)
        products = zip(self._fit_matrix(up, expert, inputs), inputs, strict=True)
        biased = (with_bias(self._experts, up, times(of), expert) for times, of in products)
        self._fit_matrix(down, expert, [activate(self._experts, of) for of in biased])

    def _sent(self) -> Iterator[torch.Tensor]:
        """Yield the tokens that each expert is fitted to, (streams, tokens, n); those of some experts are read at once.

        Every token of the layer is read once for them, so that more of them take less time.
        """
        index = torch.cat(self._index)
        places = [self._places(index, expert) for expert in range(self._experts.num_experts)]
        row = self._tokens[0]
        a_token = len(row) * row.shape[-1] * row.itemsize
        while places:
            sizes = accumulate(len(of) * a_token for of in places)
            count = max(1, sum(size <= TOKENS_AT_ONCE for size in sizes))
            yield from self._read(places[:count])
            del places[:count]

    def _places(self, index: torch.Tensor, expert: int) -> torch.Tensor:
        """Return where the tokens of an expert are among all."""
        chosen = (index == expert).any(dim=-1).nonzero()[:, 0]
        if len(chosen) < self._enough:
            chosen = torch.cat([chosen, _spread(len(index), self._enough - len(chosen)).to(chosen)])
        return chosen

    def _read(self, places: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tokens at these places, for each of some experts."""
        found: list[torch.Tensor] = []
        for row, (start, stop) in enumerate(pairwise(accumulate(map(len, self._index), initial=0))):
            tokens = self._tokens[row]
            found = found or [tokens.new_empty(len(tokens), len(of), tokens.shape[-1]) for of in places]
            for of, here in zip(found, places, strict=True):
                inside = ((here >= start) & (here < stop)).nonzero()[:, 0]
                of[:, inside] = tokens[:, here[inside] - start]
        return found

    def settle(self) -> tuple[dict[str, Stacked], dict[str, Callable[..., torch.Tensor]]]:
        """Return what stands in for the stacks, and what computes with it in the emulator, by path of the module."""
        planned, found = list(self._planned.values()), self.fit()
        parts = {path: of.parts for path, of in found.items()}
        return found, {planned[0].owner: emulated(self._experts, planned, self._format, parts)}

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
    found = StandInExperts(experts, format.layer, {each.name: each.rank for each in planned})
    for each in planned:
        device = experts.get_parameter(each.name).device
        found.load(each.name, {name: part.to(device) for name, part in parts[each.path].items()})
    return found


def _statistics(
    weight: torch.Tensor, tap: Any, narrow: bool, x: torch.Tensor, emulated: torch.Tensor | None = None
) -> tuple[torch.Tensor, Gram]:
    """Return what to fit, the weight or what answers as it does on the emulator's inputs, and the Gram to fit it to."""
    if emulated is not None:
        moments = PairedMoments([weight], narrow=narrow)
        for some in zip(x.split(ROWS), emulated.split(ROWS), strict=True):
            moments.add(*some)
        (target,) = moments.fit()
        return target, moments.gram_for(target, tap)
    gram = Gram(tap, len(weight) if tap == "output" else weight.shape[1], device=weight.device)
    for some in x.split(ROWS):
        gram.add(linear(some, weight) if tap == "output" else some)
    return weight, gram


def _spread(rows: int, count: int) -> torch.Tensor:
    """Return the indices of so many rows, evenly spaced; all, if there are fewer."""
    return torch.arange(min(count, rows)) * rows // max(1, min(count, rows))
