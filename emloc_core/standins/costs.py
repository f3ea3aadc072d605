"""What it takes to fit stand-ins, by formula, from shapes: bytes at the peak (``docs/memory.md``)."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

from emloc_core.algorithms.feedback import ROWS


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
    def tap(self) -> Any:
        """How its activations are captured: ``output``, or as inputs."""


def groups(linears: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield the Linears that share their inputs."""
    for name in dict.fromkeys(linear.group for linear in linears):
        yield [linear for linear in linears if linear.group == name]


def rounding_bytes(linears: Sequence[Planned], *, grams: float = 2, copies: float = 4, at_once: float = 3) -> int:
    """Return the peak of rounding a block's weights with feedback, ``4 (g n^2 + c m n + a r n)``.

    Before, what they are fitted to is found: where massive tokens have widened the Gram to fp64, that is rounded then,
    ``4 (3 n^2 + 2 n min(m, n))``, with what the targets need.

    Args:
        linears: of the block.
        grams: g, matrices of the size of the inputs' Gram: that itself, and its factor.
        copies: c, matrices of the size of all weights of a group, m rows: what is fitted, what it is rounded to, and
            what is on the way from one to the other.
        at_once: a, the same of as many rows as are rounded at a time, r.
    """
    most, peak = max(ROWS.values()), 0.0
    for m, n in _outputs(linears):
        rounding = grams * n**2 + (copies * m + at_once * min(m, most)) * n
        peak = max(peak, rounding, 3 * n**2 + 2 * n * min(m, n))
    return int(4 * peak)


def factoring_bytes(linears: Sequence[Planned], *, propagated: bool, smaller: bool = False) -> int:
    """Return the peak of factorising the weights of a block.

    The Grams of the block's input groups and outputs, fp32, ``4 s^2`` each, with s the side; and the largest
    factorisation, in fp64: ``8 (4 s^2 + 3 m n)`` bytes for the Gram, the eigenvectors and LAPACK's workspace
    (``dsyevd``: ``2 s^2``), and for the weight, its image and the factors. Where errors are propagated, in place of the
    Grams one group's, its Cholesky factor and what its targets need, ``4 n (2 n + min(n, m))``, with m its outputs.

    Args:
        linears: of the block.
        propagated: whether errors are propagated.
        smaller: whether each is factorised on the smaller of its Grams, whatever it is captured by.
    """
    grams: dict[Hashable, int] = {}
    work = 0
    for at, each in enumerate(linears):
        m, n = each.out_features, each.in_features
        side = m if each.tap == "output" else n
        grams[at if each.tap == "output" else each.group] = 4 * side**2  # of inputs, a group has one
        work = max(work, 8 * (4 * (min(m, n) if smaller else side) ** 2 + 3 * m * n))
    largest = max((4 * n * (2 * n + min(n, m)) for m, n in _outputs(linears)), default=0)
    return work + (largest if propagated else sum(grams.values()))


def _outputs(linears: Sequence[Planned]) -> Iterator[tuple[int, int]]:
    """Yield how many outputs the Linears of every input group have, and how many inputs."""
    for group in groups(linears):
        yield sum(each.out_features for each in group), group[0].in_features
