"""What it takes to fit stand-ins, by formula, from shapes: bytes at the peak (``docs/memory.md``)."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

from emloc_core.algorithms.factorize import KRYLOV
from emloc_core.algorithms.feedback import CHANGES
from emloc_core.algorithms.feedback import ROWS as AT_ONCE
from emloc_core.algorithms.scales import GROUP, rows_at_once
from emloc_core.algorithms.statistics import BLOCK, ROWS, Side

#: Rows that are rounded at a time.
_MOST_ROWS = max(AT_ONCE.values())


class Planned(Protocol):
    """A Linear that gets a stand-in, or one matrix of a stack; see :class:`emloc_core.emulator.ranks.LinearPlan`."""

    @property
    def group(self) -> Hashable:
        """What it shares its inputs with."""

    @property
    def out_features(self) -> int:
        """Rows of its weight, m."""

    @property
    def in_features(self) -> int:
        """Columns of its weight, n."""

    @property
    def rank(self) -> int | None:
        """Rank of its factors."""

    @property
    def tap(self) -> Side:
        """Which of its activations are captured."""


def groups(linears: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield the Linears that share their inputs."""
    for name in dict.fromkeys(linear.group for linear in linears):
        yield [linear for linear in linears if linear.group == name]


def summing_bytes(linears: Sequence[Planned]) -> int:
    """Return the peak of summing what the Linears of a group are fitted to, where errors are propagated; or a block's.

    Sums are in fp64, which dominant directions or many massive tokens may require: the Gram, and what the targets need,
    ``8 (n^2 + n min(m, n))``, with m the outputs of the group; beside that a weight, and the rows that wait. Then
    targets are computed in fp32, beside the Gram: ``12 n^2 + 4 n (min(m, n) + m)``.
    """
    return max((summing(*_sizes(group)) for group in groups(linears)), default=0)


def summing(m: int, n: int, largest: int) -> int:
    """Return the peak of one group, with m outputs, ``largest`` of them of one Linear, and n inputs."""
    sums = 8 * (n**2 + n * min(m, n) + ROWS * (5 * n + m))
    finding = 4 * n * (3 * n + min(m, n))
    if m < n:  # the outputs of the base are summed, by each weight
        return max(sums + 8 * largest * n, finding)
    return max(sums, finding + 4 * (m + largest) * n)


def gram_bytes(linears: Sequence[Planned]) -> int:
    """Return the bytes of the Grams of some Linears, in fp64: one per group for inputs, one per Linear for outputs."""
    inputs = {linear.group: linear.in_features for linear in linears if linear.tap != "output"}
    outputs = [linear.out_features for linear in linears if linear.tap == "output"]
    return 8 * sum(size**2 for size in (*inputs.values(), *outputs))


def rounding_bytes(linears: Sequence[Planned], *, scales: bool = False) -> int:
    """Return the peak of rounding the weights of a group with feedback, or of a block's; see :func:`rounding`."""
    return max((rounding(m, n, scales=scales) for m, n, _ in map(_sizes, groups(linears))), default=0)


def rounding(m: int, n: int, *, scales: bool = False) -> int:
    """Return the peak of rounding a matrix, (m, n), with feedback, ``4 (2 n^2 + (4 m + 3 r) n + 2 k r)``.

    That is the Gram and its factor; the original, the rounded matrix, and intermediate ones, three of them for the r
    rows that are rounded at a time; the changes of k columns, and what they are computed with. Before, a Gram in fp64
    is rounded, ``12 n^2``.

    Args:
        m: rows, of all weights of a group.
        n: inputs.
        scales: whether scales are fitted too, with products of the Gram and the rounded numbers of some rows.
    """
    work = 2 * n**2 + _at_work(m, n, 3)
    products = min(m, rows_at_once(n)) * -(-n // GROUP) * n if scales else 0
    return 4 * max(work + products, 3 * n**2 + m * n)


def _at_work(m: int, n: int, at_once: int) -> int:
    """Return the numbers beside Grams in :func:`rounding`."""
    rows = min(m, _MOST_ROWS)
    return (4 * m + at_once * rows) * n + 2 * CHANGES * rows


def factoring_bytes(linears: Sequence[Planned], *, propagated: bool, smaller: bool = False) -> int:
    """Return the peak of factorising the weights of a group, or of a block's, one by one, in fp64.

    Beside the Gram of the inputs and the targets in fp32 where errors are propagated, otherwise beside all Grams of the
    group: on the side of the outputs ``8 * 3.5 m^2`` for their Gram, eigenvectors and LAPACK's workspace (``dsyevd``:
    ``2 m^2``), or ``8 (m n + m^2)`` before; on the side of the inputs ``8 * 5.5 n^2``, with the weight's Cholesky
    factor; and factors, ``8 k (m + n)``, and the Krylov space for dominant eigenvectors.

    Args:
        linears: with their ranks.
        smaller: whether each is factorised on the smaller of its Grams, whatever it is captured by.
    """
    peak = 0
    for group in groups(linears):
        fitted = 4 * sum(linear.out_features * linear.in_features for linear in group)
        held = fitted + 8 * group[0].in_features ** 2 if propagated else gram_bytes(group)
        for linear in group:
            m, n, k = linear.out_features, linear.in_features, linear.rank or 0
            on_outputs = m <= n if smaller else linear.tap == "output"
            work = max(3.5 * m**2, m**2 + m * n) if on_outputs else 5.5 * n**2
            dominant = 8 * KRYLOV * (m if on_outputs else n)
            peak = max(peak, int(8 * (work + dominant + k * (m + n))) + held)
    return peak


def rounded_factoring_bytes(linears: Sequence[Planned], *, propagated: bool, smaller: bool) -> int:
    """Return the peak of factorising the weights of a group, or of a block's, and rounding the factors.

    Beside the Gram, weights, and the factors of all in fp32: another matrix of the Gram's size and the rows of V that
    are rounded as one, or the largest weight as rounded.
    """
    peak = factoring_bytes(linears, propagated=propagated, smaller=smaller)
    for group in groups(linears):
        n, shapes = group[0].in_features, [(linear.out_features, linear.rank or 0) for linear in group]
        numbers, factors = sum(m * n for m, _ in shapes), sum(k * (m + n) for m, k in shapes)
        rank, largest = sum(k for _, k in shapes), max(m for m, _ in shapes)
        v_work = _at_work(rank, n, 5)
        u_work = max(12 * m * k + 3 * k**2 for m, k in shapes)
        measuring = largest * n + 4 * min(largest, BLOCK) * n
        work = max(2 * n**2 + max(v_work, measuring), n**2 + factors + u_work, 3 * n**2)
        peak = max(peak, 4 * (numbers + factors + work))
    return peak


def _sizes(group: Sequence[Planned]) -> tuple[int, int, int]:
    """Return how many outputs the Linears of an input group have, how many inputs, and the most outputs of one."""
    outputs = [linear.out_features for linear in group]
    return sum(outputs), group[0].in_features, max(outputs)
