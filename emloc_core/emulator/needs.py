"""What stage 1 takes of a device, unit by unit, by formula from shapes: for plans, and for what a GPU keeps free.

Waiting rows are not included.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from emloc_core.emulator.ranks import TOKENS_AT_ONCE, ExpertsPlan, RankPlan
from emloc_core.family import Family
from emloc_core.model.inside import Positions, inside
from emloc_core.standins import Format, costs
from emloc_core.standins.experts import experts_per_token
from emloc_core.standins.layer import unpacked_bytes
from emloc_core.standins.vocabulary import PACKINGS


def units(model: Any, blocks: Sequence[str]) -> tuple[dict[str, int], int]:
    """Return how many numbers the blocks of a model have, by path, and the largest matrix outside them."""
    own = {path: sum(parameter.numel() for parameter in model.get_submodule(path).parameters()) for path in blocks}
    inside = tuple(f"{path}." for path in blocks)
    outside = [parameter.numel() for name, parameter in model.named_parameters() if not name.startswith(inside)]
    return own, max(outside, default=0)


@dataclass(frozen=True)
class PhaseNeed:
    """What a phase takes, in bytes.

    Attributes:
        weights: of the unit that is loaded, in the model's dtype.
        statistics: the phase's own work, and what was fitted before it and is not written yet.
        stand_ins: what stands in for the unit's weights, as rows of the emulator pass through it.
        inside: what the longest row holds inside the block.
        waits: whether rows wait meanwhile.
    """

    phase: str
    weights: int
    statistics: int = 0
    stand_ins: int = 0
    inside: int = 0
    waits: bool = True

    @property
    def nbytes(self) -> int:
        """The sum."""
        return self.weights + self.statistics + self.stand_ins + self.inside


class Needs:
    """What a pass of stage 1 takes.

    Args:
        model: the base; meta tensors suffice.
        plan: with ranks.
        passing: returns how many positions pass through the module at a path.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        plan: RankPlan,
        format: Format,
        dtype: torch.dtype,
        *,
        propagated: bool,
        passing: Callable[[str], Positions],
    ) -> None:
        self._model, self._plan, self._format, self._dtype = model, plan, format, dtype
        self._propagated, self._passing = propagated, passing
        self._inside = inside(model, family)
        self._blocks, self._outside_most = units(model, list(self._inside))

    def __iter__(self) -> Iterator[PhaseNeed]:
        """Yield what every phase takes."""
        for block in self._blocks:
            yield from self._block(block)
        yield from self._outside()

    def _block(self, block: str) -> Iterator[PhaseNeed]:
        weights, linears = self._blocks[block] * self._dtype.itemsize, self._plan.in_block(block)
        inside = self._passing(block).at_once * self._inside[block].forward * self._dtype.itemsize
        layers = self._plan.experts_in_block(block).values()
        experts = sum(map(self._experts_as_read, layers))
        for statistics, stand_ins in self._format.phases(linears, self._dtype, propagated=self._propagated):
            yield PhaseNeed("the largest block", weights, statistics, self._propagated * (stand_ins + experts), inside)
        held = self._format.fitted_bytes(linears, self._dtype)
        read = self._propagated * self._format.reading_bytes(linears, self._dtype.itemsize)
        for stacks in layers:
            yield PhaseNeed("the experts of a layer", weights, held + self._fitting_experts(stacks), read)

    def _outside(self) -> Iterator[PhaseNeed]:
        """Yield what modules outside the blocks take: of those that stay dense, the largest matrix alone."""
        itemsize = self._dtype.itemsize
        yield PhaseNeed("the largest matrix outside the blocks", self._outside_most * itemsize)
        for matrix in self._plan.vocabulary:
            packing, size = PACKINGS[matrix.packing], (matrix.rows, matrix.features, self._dtype)
            weights, packed = matrix.numbers * itemsize, packing.nbytes(*size)
            if not matrix.is_fitted:
                yield PhaseNeed("packing the vocabulary", weights, packing.packing_bytes(*size), waits=False)
                yield PhaseNeed("packed embeddings", weights, 0, self._propagated * packed)
            else:
                yield PhaseNeed("the output layer", weights, packing.packing_bytes(*size))

    def _experts_as_read(self, stacks: Sequence[ExpertsPlan]) -> int:
        """Return the bytes of a layer's experts as rows pass through them: packed, and some of them unpacked."""
        unpacked = [unpacked_bytes(stack.shape, stack.experts, self._dtype) for stack in stacks]
        return self._packed(stacks) + max(unpacked)

    def _packed(self, stacks: Sequence[ExpertsPlan]) -> int:
        return sum(stack.nbytes(self._format, self._dtype) for stack in stacks)

    def _fitting_experts(self, stacks: Sequence[ExpertsPlan]) -> int:
        """Return the peak of fitting a layer's experts: all of them packed, one being fitted, and the tokens of some.

        Tokens are read for as many experts as :data:`TOKENS_AT_ONCE` allows, for one at least: from the base, and where
        errors are propagated from the emulator; every expert is assumed to get as many. The outputs of its first matrix
        are held while the second is fitted. For every token of the layer there are 8 bytes for each of its experts,
        three times: by row, of all rows, and by expert.
        """
        itemsize, streams = self._dtype.itemsize, 1 + self._propagated
        hidden = max(stack.out_features if stack.name == "down_proj" else stack.in_features for stack in stacks)
        tokens = experts_per_token(self._model.config) * self._passing(stacks[0].path).all
        sent = streams * tokens * itemsize
        of_one = -(-sent // stacks[0].experts)

        def fitting(stack: ExpertsPlan) -> int:
            alone = [replace(stack, experts=1)]
            inner = 4 * stack.in_features * of_one if stack.name == "down_proj" else 0
            needed = self._format.fitting_bytes(alone, propagated=self._propagated, itemsize=itemsize)
            return inner + (max(needed, costs.summing_bytes(alone)) if self._propagated else needed)

        read = min(sent, max(TOKENS_AT_ONCE // hidden, of_one)) * hidden
        return self._packed(stacks) + max(map(fitting, stacks)) + read + 3 * 8 * tokens
