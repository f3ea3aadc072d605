"""Error-propagating calibration: every Linear compensates for the ones compressed before it.

Two streams of the calibration rows pass through the model side by side, one through the base and one through the
emulator so far. A Linear's factors are fitted to give the base's output (``W x``) on the emulator's input (``xc``):
``W2 = W R`` with the ridge regression ``R = (sum x xc^T + a I)(sum xc xc^T + a I)^-1``, followed by the usual
factorisation of W2 on the Gram of xc. Within a block the input groups are fitted in order, each on inputs from the
compressed ones before it: every row waits inside the block, where it reaches the group that is being fitted, and so
passes through the block once in each stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.products import by_onednn
from emloc_core.algorithms.statistics import ROWS, Gram, Side, cheaper_side
from emloc_core.emulator.ranks import LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.model.hooks import forwards
from emloc_core.model.parking import require_own
from emloc_core.model.streaming import Stream
from emloc_core.standins import StandIn
from emloc_core.standins.standin import Fitted

#: a: the ridge, as a fraction of the mean diagonal of the emulator's Gram. Pulls R towards the identity.
RIDGE = 0.02


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

    @by_onednn()
    def _flush(self) -> None:
        if self._pairs:
            self._cross = self._cross.to(self.emulator.dtype)
            x, xc = (torch.cat(rows).to(self._cross) for rows in zip(*self._pairs, strict=True))
            if self._crosses_outputs:
                x = torch.cat([x @ weight.to(x).T for weight in self._weights], dim=1)
            self._cross.addmm_(x.T, xc)
            self._pairs = []

    @by_onednn()
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

    @staticmethod
    def side(fitted: torch.Tensor, tap: Any = None) -> Side:
        """Return whose Gram a Linear with the weight ``fitted`` and this tap is fitted to.

        Without a tap it is the cheaper one; a family's own tap captures inputs.
        """
        if tap is None:
            return cheaper_side(*fitted.shape)
        return "output" if tap == "output" else "input"

    def gram_for(self, fitted: torch.Tensor, tap: Any = None) -> Gram:
        """Return that Gram, on the emulator's inputs."""
        return self.emulator.through(fitted) if self.side(fitted, tap) == "output" else self.emulator


def _solved(matrix: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return ``M (L L^T)^-1`` for M (m, n) and L (n, n); unlike ``cholesky_solve`` it makes no copy of L."""
    half = torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def fit_block(
    stream: Stream,
    planned: Sequence[LinearPlan],
    rows: int,
    fit: Callable[[Sequence[LinearPlan], Sequence[torch.Tensor], Gram], Sequence[Fitted]],
    read: Callable[[str, Fitted], StandIn],
    blame: Callable[[EmlocError, str, int], EmlocError],
) -> dict[str, Fitted]:
    """Fit all Linears of a block while the samples that wait at it pass through it.

    Args:
        stream: samples ``0 .. rows - 1`` pass through the base, ``rows .. 2 rows - 1`` through the emulator. They are
            at the block, with the base's weights; in the end, they have passed through it.
        planned: its Linears, in execution order.
        rows: number of calibration rows; those that do not pass through the block are ignored.
        fit: takes Linears, their weights and the Gram of the inputs that all of them have, or of the outputs of a
            single one.
        read: takes a Linear's path and what was fitted, and returns that as it will be read.
        blame: takes an error, a Linear's path and a row's index, and returns the error for the user.

    Returns:
        What was fitted, by module path.

    Raises:
        EmlocError: a Linear did not run, or ran twice, or its inputs are NaN or Inf.
    """
    found: dict[str, Fitted] = {}
    done: dict[str, StandIn] = {}
    here = [sample for sample in stream.here if sample < rows]
    modules = {linear.path: stream.skeleton.model.get_submodule(linear.path) for linear in planned}
    inputs: list[torch.Tensor] = []
    with emulating(stream, modules, done, rows), _pausing(stream, modules, planned, rows, inputs.append):
        for group in dict.fromkeys(linear.group for linear in planned):
            members = [linear for linear in planned if linear.group == group]
            first = members[0].path
            weights = [stream.skeleton.model.get_parameter(f"{linear.path}.weight").detach() for linear in members]
            moments = PairedMoments(weights)
            for row in here:
                for sample in (row, row + rows):
                    if stream.step(sample) != first:
                        raise _did_not_run(first)
                try:
                    moments.add(*inputs)
                except EmlocError as error:
                    raise blame(error, first, row) from None
                inputs.clear()
            try:
                targets = moments.fit()
            except EmlocError as error:
                raise EmlocError(
                    f"{error}: the inputs of {first}.", "Check the weights up to this layer.", code=error.code
                ) from None
            sides = [moments.side(fitted, linear.tap) for linear, fitted in zip(members, targets, strict=True)]
            shared = [at for at, side in enumerate(sides) if side == "input"]
            for part in ([shared] if shared else []) + [[at] for at, side in enumerate(sides) if side == "output"]:
                linears, fitted = [members[at] for at in part], [targets[at] for at in part]
                made = fit(linears, fitted, moments.gram_for(fitted[0], linears[0].tap))
                found.update(zip([linear.path for linear in linears], made, strict=True))
            done.update({linear.path: read(linear.path, found[linear.path]) for linear in members})
        for row in here:
            for sample in (row, row + rows):
                stream.step(sample)
    return found


def _did_not_run(path: str) -> EmlocError:
    fix = "List it in keep_dense of the family's declaration."
    return EmlocError(f"{path} did not run when its block did.", fix, code="plugin")


@contextmanager
def _pausing(
    stream: Stream,
    modules: Mapping[str, nn.Module],
    planned: Sequence[LinearPlan],
    rows: int,
    sink: Callable[[torch.Tensor], None],
) -> Iterator[None]:
    """Give ``sink`` a copy of what every sample feeds an input group, and pause the sample there.

    It waits at the path of the group's first Linear, whichever of them runs first.
    """
    reached: set[tuple[int, Any]] = set()
    places: dict[tuple[str, ...], str] = {}
    for linear in planned:
        places.setdefault(linear.group, linear.path)

    def reaching(linear: LinearPlan, inputs: Callable[[], torch.Tensor], args: Any) -> None:
        if (stream.sample, linear.path) in reached:
            raise EmlocError(
                f"{linear.path} ran twice in one forward of its block.",
                "List it in keep_dense of the family's declaration.",
                code="plugin",
            )
        first_of_group = (stream.sample, linear.group) not in reached
        reached.update([(stream.sample, linear.path), (stream.sample, linear.group)])
        if first_of_group:
            given = inputs()
            require_own(given)
            sink(given.clone())
            stream.pause(places[linear.group], args, inside=True)

    def before(linear: LinearPlan) -> Callable[..., None]:
        return lambda _module, args: reaching(linear, lambda: args[0], args)

    def after(linear: LinearPlan) -> Callable[..., Any]:
        """The family's own function needs the output, which a sample of the emulator must compute once more."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            reaching(linear, lambda: linear.tap(module, args, output), (*args, output))
            return module.forward(*args) if stream.sample >= rows else None

        return hook

    with ExitStack() as stack:
        for linear in planned:
            module = modules[linear.path]
            registered = (
                module.register_forward_pre_hook(before(linear))
                if isinstance(linear.tap, str)
                else module.register_forward_hook(after(linear))
            )
            stack.callback(registered.remove)
        yield
    ran = {path for _, path in reached}
    for linear in planned:
        if linear.path not in ran:
            raise _did_not_run(linear.path)


@contextmanager
def emulating(
    stream: Stream, modules: Mapping[str, nn.Module], stand_ins: Mapping[str, StandIn], rows: int
) -> Iterator[None]:
    """Let Linears answer with their stand-ins for the samples from index ``rows`` on, those of the emulator.

    Linears that have none yet compute their own.
    """

    def answer(path: str, module: nn.Module) -> Callable[..., torch.Tensor]:
        own, bias = module.forward, getattr(module, "bias", None)

        @by_onednn()
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            if stream.sample < rows or path not in stand_ins:
                found: torch.Tensor = own(*args, **kwargs)
                return found
            return stand_ins[path](args[0], bias)

        return forward

    with forwards((module, answer(path, module)) for path, module in modules.items()):
        yield
