"""Error-propagating calibration: every Linear compensates for the ones compressed before it.

Two streams of the calibration rows pass through the model side by side, one through the base and one through the
emulator so far. A Linear's factors are fitted to give the base's output (``W x``) on the emulator's input (``xc``):
``W2 = W R`` with the ridge regression ``R = (sum x xc^T + a I)(sum xc xc^T + a I)^-1``, followed by the usual
factorisation of W2 on the Gram of xc. Within a block the input groups are fitted in order, each on inputs from the
compressed ones before it: every row waits inside the block, where it reaches the group that is being fitted, and so
passes through the block once in each stream.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from emloc_core.algorithms.products import by_onednn
from emloc_core.algorithms.statistics import ROWS, Gram, Side, blocks, held, rounded
from emloc_core.emulator.ranks import LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.model.hooks import forward_hooks, forwards
from emloc_core.model.parking import require_own
from emloc_core.model.streaming import Stream
from emloc_core.processes.heap import give_back
from emloc_core.standins import StandIn
from emloc_core.standins.costs import groups
from emloc_core.standins.standin import Fitted

#: a: the ridge, as a fraction of the mean diagonal of the emulator's Gram. Pulls R towards the identity.
RIDGE = 0.02


class PairedMoments:
    """Sums over tokens of an input group: ``xc xc^T``, (n, n), and what the targets of its Linears need of ``x xc^T``.

    That is ``W x xc^T``, which is summed itself where it is smaller, as in a Linear with more inputs than outputs.

    Args:
        weights: W, (m, n), of every Linear of the group.
        narrow: whether stand-ins are fitted to the Gram in fp32; see :attr:`emloc_core.standins.Format.narrow`.
        dtype: of the sums, which may widen, and of the targets.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], *, narrow: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        size, device = weights[0].shape[1], weights[0].device
        outputs = sum(len(weight) for weight in weights)
        self._weights, self._narrow, self._dtype = weights, narrow, dtype
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
        self._pairs.append((held(base, self._cross.dtype), held(emulator, self._cross.dtype)))
        if sum(len(x) for x, _ in self._pairs) >= ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._pairs:
            self._cross = self._cross.to(self.emulator.dtype)
            x, xc = (torch.cat(rows) for rows in zip(*self._pairs, strict=True))
            if self._crosses_outputs:
                with by_onednn(x, *self._weights):
                    x = torch.cat([x.to(self._cross) @ weight.to(self._cross).T for weight in self._weights], dim=1)
            with by_onednn(x, xc):
                self._cross.addmm_(x.to(self._cross).T, xc.to(self._cross))
            self._pairs = []

    @by_onednn()
    def fit(self) -> list[torch.Tensor]:
        """Return W2, (m, n), for every weight: what comes closest to the weight's outputs on the base's inputs.

        The sums for the targets are used up. Targets are computed in fp32, in units in which the Gram's mean diagonal
        is about 1: the ridge, a share of the heavy rows' energy too, is far above what is lost.

        Raises:
            EmlocError: a sum is beyond the range of its dtype.
        """
        rest, heavy = self.emulator.parts()
        self._flush()  # in the dtype that the Gram has now
        mean = float(rest.diagonal().double().mean() + heavy.square().sum() / len(rest))
        unit = 2.0 ** -math.frexp(mean)[1]  # by a power of two nothing is rounded
        cross = self._cross
        del self._cross
        cross = rounded(cross, heavy[:0], cross if cross.dtype == self._dtype else self._empty(cross), unit)
        if self._narrow:
            self.emulator.narrow()
            rest, heavy = self.emulator.parts()
        gram = rounded(rest, heavy, self._empty(rest).mT, unit)  # by columns, as LAPACK writes
        if not bool(torch.isfinite(gram.sum() + cross.sum())):
            raise EmlocError("The activations are too large to be summed", code="not-finite")
        ridge = RIDGE * gram.diagonal().clone().mean().clamp(min=torch.finfo(gram.dtype).tiny)
        targets = []
        for weight, summed in zip(self._weights, self._split(cross), strict=True):
            target = summed if self._crosses_outputs else weight.to(gram) @ cross
            for rows in blocks(len(target)):
                target[rows].addcmul_(weight[rows].to(gram), ridge)
            targets.append(target)
        del cross, summed
        gram.diagonal().add_(ridge)
        torch.linalg.cholesky(gram, out=gram)
        for target in targets:
            torch.linalg.solve_triangular(gram.mT, target, upper=True, left=False, out=target)
            torch.linalg.solve_triangular(gram, target, upper=False, left=False, out=target)
        return targets

    def _split(self, cross: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the sum for each weight; where outputs are not crossed, all have the same."""
        rows = [len(weight) for weight in self._weights]
        return cross.split(rows) if self._crosses_outputs else [cross] * len(rows)

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(like, dtype=self._dtype)

    def gram_for(self, fitted: torch.Tensor, side: Side) -> Gram:
        """Return the Gram of the emulator's inputs, or of the outputs that a weight gives for them."""
        return self.emulator.through(fitted) if side == "output" else self.emulator


class Stop(Protocol):
    """Where rows wait in a block until its stand-ins there are fitted to them."""

    def add(self, *inputs: torch.Tensor) -> None:
        """Add the inputs of a row: in the base, then in the emulator."""

    def settle(self) -> tuple[Mapping[str, Any], Mapping[str, Callable[..., torch.Tensor]]]:
        """Return what was fitted, by path, and what computes with it instead of modules, by their paths."""


class _Group:
    """Linears that share their inputs; see :func:`fit_block`."""

    def __init__(
        self,
        members: Sequence[LinearPlan],
        model: nn.Module,
        fit: Callable[[Sequence[LinearPlan], Sequence[torch.Tensor], Gram], Sequence[Fitted]],
        read: Callable[[str, Fitted], StandIn],
        narrow: bool,
    ) -> None:
        self._members, self._fit, self._read = members, fit, read
        weights = [model.get_parameter(f"{linear.path}.weight").detach() for linear in members]
        self._moments = PairedMoments(weights, narrow=narrow)

    def add(self, *inputs: torch.Tensor) -> None:
        self._moments.add(*inputs)

    def settle(self) -> tuple[dict[str, Fitted], dict[str, StandIn]]:
        try:
            targets = self._moments.fit()
        except EmlocError as error:
            raise EmlocError(
                f"{error}: the inputs of {self._members[0].path}.",
                "Check the weights up to this layer.",
                code=error.code,
            ) from None
        fitted: dict[str, Fitted] = {}
        sides = [linear.tap for linear in self._members]
        shared = [index for index, side in enumerate(sides) if side == "input"]
        for part in ([shared] if shared else []) + [[index] for index, side in enumerate(sides) if side == "output"]:
            linears, part_targets = [self._members[index] for index in part], [targets[index] for index in part]
            part_fitted = self._fit(linears, part_targets, self._moments.gram_for(part_targets[0], linears[0].tap))
            fitted.update(zip([linear.path for linear in linears], part_fitted, strict=True))
        return fitted, {linear.path: self._read(linear.path, fitted[linear.path]) for linear in self._members}


def fit_block(
    stream: Stream,
    planned: Sequence[LinearPlan],
    experts: Mapping[str, Stop],
    rows: int,
    fit: Callable[[Sequence[LinearPlan], Sequence[torch.Tensor], Gram], Sequence[Fitted]],
    read: Callable[[str, Fitted], StandIn],
    blame: Callable[[EmlocError, str, int], EmlocError],
    *,
    narrow: bool,
) -> dict[str, Any]:
    """Fit all Linears and experts of a block while the samples that wait at it pass through it.

    Args:
        stream: samples ``0 .. rows - 1`` pass through the base, ``rows .. 2 rows - 1`` through the emulator. They are
            at the block, with the base's weights; in the end, they have passed through it.
        experts: what fits its experts, by path of their module.
        rows: number of calibration rows; those that do not pass through the block are ignored.
        fit: takes Linears, their weights and the Gram of the inputs that all of them have, or of the outputs of a
            single one.
        read: takes a Linear's path and what was fitted, and returns that as it will be read.
        blame: takes an error, a path and a row's index, and returns the error for the user.

    Returns:
        What was fitted, by path.

    Raises:
        EmlocError: a Linear did not run, or ran twice, or its inputs are NaN or Inf.
    """
    fitted: dict[str, Any] = {}
    done: dict[str, Any] = {}
    here = [sample for sample in stream.visiting if sample < rows]
    model = stream.skeleton.model
    modules = {path: model.get_submodule(path) for path in [*(linear.path for linear in planned), *experts]}
    members = {group[0].path: group for group in groups(planned)}
    remaining = [*members, *experts]
    brought: list[Sequence[torch.Tensor]] = []
    with (
        emulating(stream, modules, done, rows),
        _pausing(stream, modules, planned, list(experts), brought.append),
    ):
        while remaining:
            stop: Stop | None = None
            path = ""  # the first of what is left that they reach, all the same one
            for row in here:
                for sample in (row, row + rows):
                    reached = stream.step(sample)
                    if reached is None or reached not in remaining or path not in ("", reached):
                        raise _did_not_run(path or remaining[0])
                    path = reached
                stop = stop or experts.get(path) or _Group(members[path], model, fit, read, narrow)
                try:
                    stop.add(*brought[0], *brought[1])
                except EmlocError as error:
                    raise blame(error, path, row) from None
                brought.clear()
            assert stop is not None
            remaining.remove(path)
            give_back()
            settled, answers = stop.settle()
            fitted.update(settled)
            done.update(answers)
        for row in here:
            for sample in (row, row + rows):
                stream.step(sample)
    return fitted


def _did_not_run(path: str) -> EmlocError:
    fix = "List it in keep_dense of the family's declaration."
    return EmlocError(f"{path} did not run when its block did.", fix, code="plugin")


@contextmanager
def _pausing(
    stream: Stream,
    modules: Mapping[str, nn.Module],
    planned: Sequence[LinearPlan],
    experts: Sequence[str],
    sink: Callable[[Sequence[torch.Tensor]], None],
) -> Iterator[None]:
    """Give ``sink`` a copy of what every sample feeds an input group, or experts, and pause the sample there.

    It waits at the path of the group's first Linear, whichever of them runs first, or at that of the experts.
    """
    reached: set[tuple[int, Any]] = set()
    stops: dict[tuple[str, ...], str] = {}
    for linear in planned:
        stops.setdefault(linear.group, linear.path)

    def reach(path: str, group: tuple[str, ...], inputs: Sequence[torch.Tensor], args: Any) -> None:
        if (stream.sample, path) in reached:
            raise EmlocError(
                f"{path} ran twice in one forward of its block.",
                "List it in keep_dense of the family's declaration.",
                code="plugin",
            )
        first_of_group = (stream.sample, group) not in reached
        reached.update([(stream.sample, path), (stream.sample, group)])
        if first_of_group:
            for tensor in inputs:
                require_own(tensor)
            sink([tensor.clone() for tensor in inputs])
            stream.pause(stops.get(group, path), args, inside=True)

    def reaching(path: str, group: tuple[str, ...], count: int) -> Callable[..., None]:
        return lambda _module, args: reach(path, group, args[:count], args)

    hooks = [(modules[linear.path], reaching(linear.path, linear.group, 1)) for linear in planned]
    hooks += [(modules[path], reaching(path, (path,), 2)) for path in experts]  # tokens, and where they are sent
    with forward_hooks(hooks, before=True):
        yield
    ran = {path for _, path in reached}
    for linear in planned:
        if linear.path not in ran:
            raise _did_not_run(linear.path)


@contextmanager
def emulating(
    stream: Stream, modules: Mapping[str, nn.Module], stand_ins: Mapping[str, Callable[..., torch.Tensor]], rows: int
) -> Iterator[None]:
    """Let Linears and experts answer with their stand-ins for the samples from index ``rows`` on, the emulator's.

    Those that have none yet compute their own.
    """

    def answer(path: str, module: nn.Module) -> Callable[..., torch.Tensor]:
        own, bias = module.forward, getattr(module, "bias", None)

        @by_onednn()
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            if stream.sample < rows or path not in stand_ins:
                return own(*args, **kwargs)
            stand_in = stand_ins[path]
            return stand_in(args[0], bias) if isinstance(stand_in, StandIn) else stand_in(*args, **kwargs)

        return forward

    with forwards((module, answer(path, module)) for path, module in modules.items()):
        yield
