"""Rank allocation: the rank of every Linear, by its shape alone or by what calibration says of it."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: Lowest and highest rank under ``global``, as multiples of the uniform one.
BOUNDS = (0.5, 2.0)
TINY = sys.float_info.min

#: (out_features, in_features) of a Linear, m x n.
Shape = tuple[int, int]


@dataclass(frozen=True)
class Spectrum:
    """Results of calibration for a Linear.

    Attributes:
        energies: energy of the outputs on the calibration rows along every direction, in the order in which ranks take
            them, descending if the factors are optimal: (min(m, n),), fp64.
        sensitivity: how much its error disturbs its block: the mean squared change of the block's output, relative to
            each token's own length, per unit of ``err(k)^2``; see :mod:`emloc_core.emulator.sensitivity`.
    """

    path: str
    block: str
    energies: torch.Tensor
    sensitivity: float


def largest_rank(out_features: int, in_features: int) -> int:
    """Return the largest rank whose factors are smaller than the weight: the largest k with ``k (m + n) < m n``."""
    return (out_features * in_features - 1) // (out_features + in_features)


def rank_cap(rank: int, shape: Shape) -> int:
    """Return the cap under ``global`` of a Linear whose uniform rank is ``rank``."""
    return max(rank, min(math.floor(BOUNDS[1] * rank), largest_rank(*shape)))


def uniform(shapes: Sequence[Shape], ratio: float) -> list[int]:
    """Return the ranks that keep the fraction ``ratio`` of every Linear's parameters (the paper's allocation).

    ``rank = floor(ratio * m * n / (m + n))``, at least 1.
    """
    return [max(1, int(ratio * m * n / (m + n))) for m, n in shapes]


def global_budget(shapes: Sequence[Shape], ratio: float, spectra: Sequence[Spectrum]) -> list[int]:
    """Return ranks that share one parameter budget, that of :func:`uniform`, by how much they disturb the blocks.

    Minimises the sum over the Linears of ``sensitivity * err(k)^2``, where ``err(k)^2`` is the share of a Linear's
    output energy that is lost at rank k, subject to ``sum k (m + n) <= budget``. Gains descend, so that taking
    single ranks in the order of their gain per parameter is the Lagrangian optimum, short of less than one rank.
    Every Linear stays within :data:`BOUNDS` of its uniform rank, and below dense.

    The energies alone (sensitivity 1) gain less, and lose at a ratio of 0.4:
    see ``docs/decisions/0026-ranks-by-need.md``.
    """
    base = uniform(shapes, ratio)
    floors = [math.ceil(BOUNDS[0] * rank) for rank in base]
    caps = [rank_cap(rank, shape) for rank, shape in zip(base, shapes, strict=True)]
    gains = [
        descending(spectrum.energies) * (spectrum.sensitivity / max(float(spectrum.energies.sum()), TINY))
        for spectrum in spectra
    ]
    return spend(shapes, gains, floors, caps, sum(rank * sum(shape) for rank, shape in zip(base, shapes, strict=True)))


def descending(energies: torch.Tensor) -> torch.Tensor:
    """Return energies with every rising run replaced by its mean; descending ones are returned as they are.

    A factorizer whose factors are not optimal may take a direction of much energy late. The directions before it are
    worth the mean, since no rank has it without them: the least concave majorant of the energy that is kept, by
    pool-adjacent-violators.

    Args:
        energies: (s,), in the order in which ranks take them.
    """
    if bool((energies[1:] <= energies[:-1]).all()):
        return energies
    runs: list[tuple[float, int]] = []
    for energy in energies.tolist():
        total, length = energy, 1
        while runs and runs[-1][0] * length < total * runs[-1][1]:
            before, ranks = runs.pop()
            total, length = total + before, length + ranks
        runs.append((total, length))
    means = torch.tensor([total / length for total, length in runs], dtype=energies.dtype)
    return means.repeat_interleave(torch.tensor([length for _, length in runs]))


def spend(
    shapes: Sequence[Shape], gains: Sequence[torch.Tensor], floors: Sequence[int], caps: Sequence[int], budget: int
) -> list[int]:
    """Return ranks between floors and caps that gain the most for ``budget`` parameters.

    Args:
        shapes: shapes of the Linears; a rank costs m + n parameters.
        gains: gain of each further rank of a Linear, (>= cap,), non-increasing.
        budget: number of parameters, at least the cost of the floors.
    """
    costs = torch.tensor([sum(shape) for shape in shapes])
    steps = [cap - floor for floor, cap in zip(floors, caps, strict=True)]
    owner = torch.repeat_interleave(torch.arange(len(shapes)), torch.tensor(steps))
    gain = torch.cat([gain[floor:cap].double() for gain, floor, cap in zip(gains, floors, caps, strict=True)])
    order = torch.argsort(gain / costs[owner], descending=True, stable=True)  # stable: a Linear's ranks stay in order
    remaining = budget - int((torch.tensor(floors) * costs).sum())
    owners = owner[order[costs[owner][order].cumsum(0) <= remaining]]
    return [
        floor + int(more) for floor, more in zip(floors, torch.bincount(owners, minlength=len(shapes)), strict=True)
    ]
