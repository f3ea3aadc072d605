"""Error-propagating calibration: every Linear compensates for the ones compressed before it.

Two streams of the calibration rows pass through the model side by side, one through the base and one through the
emulator so far. A Linear's factors are fitted to give the base's output (``W x``) on the emulator's input (``xc``):
``W2 = W R`` with the ridge regression ``R = (sum x xc^T + a I)(sum xc xc^T + a I)^-1``, followed by the usual
factorisation of W2 on the Gram of xc. Within a block the input groups are fitted in order, each on inputs from the
compressed ones before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from emloc_core.algorithms.factorize import Factors
from emloc_core.algorithms.statistics import ROWS, Gram, cheaper_side
from emloc_core.emulator.ranks import LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.model.hooks import forwards, tapped
from emloc_core.model.streaming import Stream

#: a: the ridge, as a fraction of the mean diagonal of the emulator's Gram. Pulls R towards the identity.
RIDGE = 0.02

#: U (m, k) and V (k, n) by module path, in the dtype that is written.
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


class _ReachedError(Exception):
    """The block's forward reached the tapped Linear: the rest is not needed."""


class PairedMoments:
    """Sums over tokens of an input group: ``xc xc^T``, (n, n), and what the targets of its Linears need of ``x xc^T``.

    That is ``W x xc^T``, which is summed itself where it is smaller, as in a Linear with more inputs than outputs.

    Args:
        weights: W, (m, n), of every Linear of the group.
        dtype: dtype of the sums.
    """

    def __init__(self, weights: Sequence[torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
        size, device = weights[0].shape[1], weights[0].device
        outputs = sum(len(weight) for weight in weights)
        self._weights = weights
        self._crosses_outputs = outputs < size
        self.emulator = Gram("input", size, dtype, device)
        self._cross = torch.zeros(min(outputs, size), size, dtype=dtype, device=device)
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, base: torch.Tensor, emulator: torch.Tensor) -> None:
        """Add the inputs of the same tokens, (..., n), in the base and in the emulator.

        Raises:
            EmlocError: they hold NaN or Inf.
        """
        self.emulator.add(emulator)
        x, xc = (rows.reshape(-1, rows.shape[-1]).to(self._cross, copy=True) for rows in (base, emulator))
        self._pairs.append((x, xc))
        if sum(len(x) for x, _ in self._pairs) >= ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._pairs:
            self._cross = self._cross.to(self.emulator.dtype)
            x, xc = (torch.cat(rows).to(self._cross) for rows in zip(*self._pairs, strict=True))
            if self._crosses_outputs:
                x = torch.cat([x @ weight.to(x).T for weight in self._weights], dim=1)
            self._cross.addmm_(x.T, xc)
            self._pairs = []

    def fit(self) -> list[torch.Tensor]:
        """Return W2, (m, n), for every weight: what answers best as the weight does on the base's inputs.

        What the targets need is given up for it. Heavy rows may join the Gram here: the ridge, a share of their energy
        too, is far above what they round away.

        Raises:
            EmlocError: a sum is beyond the range of its dtype.
        """
        gram, heavy = self.emulator.parts()
        self._flush()
        if len(heavy):
            gram = gram.addmm(heavy.T.to(gram), heavy.to(gram))
        if not bool(torch.isfinite(gram.sum() + self._cross.sum())):
            raise EmlocError("The activations are too large to be summed", code="not-finite")
        diagonal = gram.diagonal().clone()
        ridge = RIDGE * diagonal.mean().clamp(min=torch.finfo(gram.dtype).tiny)
        weights = [weight.to(gram) for weight in self._weights]
        if self._crosses_outputs:
            products = list(self._cross.split([len(weight) for weight in weights]))
        else:
            products = [weight @ self._cross for weight in weights]
        targets = [product.add_(weight * ridge) for product, weight in zip(products, weights, strict=True)]
        del self._cross
        gram.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(gram)
        gram.diagonal().copy_(diagonal)
        return [_solved(target, factor) for target in targets]

    def gram_for(self, fitted: torch.Tensor, tap: Any = None) -> Gram:
        """Return the Gram that a Linear with the weight ``fitted`` and this tap is fitted to, on the emulator's inputs.

        Without a tap it is the cheaper one; a family's own tap captures inputs.
        """
        side = cheaper_side(*fitted.shape) if tap is None else tap
        return self.emulator.through(fitted) if side == "output" else self.emulator


def _solved(matrix: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return ``M (L L^T)^-1`` for M (m, n) and L (n, n); unlike ``cholesky_solve`` it makes no copy of L."""
    half = torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def fit_block(
    stream: Stream,
    block: nn.Module,
    planned: Sequence[LinearPlan],
    rows: int,
    factorize: Callable[[LinearPlan, torch.Tensor, Gram], Factors],
    blame: Callable[[EmlocError, str, int], EmlocError],
) -> dict[str, Factors]:
    """Fit all Linears of a block on samples that wait at it.

    Args:
        stream: samples ``0 .. rows - 1`` pass through the base, ``rows .. 2 rows - 1`` through the emulator.
        block: with the base's weights.
        planned: its Linears, in execution order.
        rows: number of calibration rows; those that do not pass through the block are ignored.
        factorize: takes a Linear, its weight and a Gram; see :mod:`emloc_core.algorithms.factorize`.
        blame: takes an error, a Linear's path and a row's index, and returns the error for the user.

    Returns:
        The factors by module path.
    """
    found: dict[str, Factors] = {}
    done: Pairs = {}
    modules = {linear.path: stream.skeleton.model.get_submodule(linear.path) for linear in planned}
    for group in dict.fromkeys(linear.group for linear in planned):
        members = [linear for linear in planned if linear.group == group]
        weights = [stream.skeleton.model.get_parameter(f"{linear.path}.weight").detach() for linear in members]
        moments = PairedMoments(weights)
        with emulating(stream, {path: modules[path] for path in done}, done, rows):
            for row in (sample for sample in stream.here if sample < rows):
                x, xc = (_input(stream, block, members[0], modules, sample) for sample in (row, row + rows))
                try:
                    moments.add(x, xc)
                except EmlocError as error:
                    raise blame(error, members[0].path, row) from None
        try:
            targets = moments.fit()
        except EmlocError as error:
            raise EmlocError(
                f"{error}: the inputs of {members[0].path}.", "Check the weights up to this layer.", code=error.code
            ) from None
        for linear, weight, fitted in zip(members, weights, targets, strict=True):
            found[linear.path] = factorize(linear, fitted, moments.gram_for(fitted, linear.tap))
            u, v = found[linear.path].pair()
            done[linear.path] = (u.to(weight), v.to(weight))
    return found


def _input(
    stream: Stream, block: nn.Module, linear: LinearPlan, modules: Mapping[str, nn.Module], sample: int
) -> torch.Tensor:
    """Run a block on a waiting sample's arguments, up to a Linear; return that Linear's input."""
    seen: list[torch.Tensor] = []

    def sink(_path: str, activations: torch.Tensor) -> None:
        seen.append(activations)
        raise _ReachedError

    tap = "input" if isinstance(linear.tap, str) else linear.tap
    tapping = tapped({linear.path: modules[linear.path]}, {linear.path: tap}, sink)
    with stream.arguments(sample) as (args, kwargs), tapping, suppress(_ReachedError):
        block(*args, **kwargs)
    if not seen:
        raise EmlocError(
            f"{linear.path} did not run when its block did.",
            "List it in keep_dense of the family's declaration.",
            code="plugin",
        )
    return seen[0]


@contextmanager
def emulating(stream: Stream, modules: Mapping[str, nn.Module], pairs: Pairs, rows: int) -> Iterator[None]:
    """Compute Linears' outputs with their factors for samples that pass through the emulator: from index ``rows``."""

    def answer(module: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> Callable[..., torch.Tensor]:
        own, bias = module.forward, getattr(module, "bias", None)
        *first, last = [factor for factor in reversed(pair) if not _is_identity(factor)] or pair[:1]

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            if stream.sample < rows:
                found: torch.Tensor = own(*args, **kwargs)
                return found
            return functional.linear(reduce(functional.linear, first, args[0]), last, bias)

        return forward

    with forwards((module, answer(module, pairs[path])) for path, module in modules.items()):
        yield


def _is_identity(factor: torch.Tensor) -> bool:
    """Return whether it changes nothing: beside a weight that stands for itself, it need not be multiplied by."""
    m, n = factor.shape
    return m == n and bool((factor.diagonal() == 1).all()) and int(factor.count_nonzero()) == m
