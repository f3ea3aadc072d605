"""Advances many forwards of one model in lockstep: all of them pass one unit before any reaches the next.

Each forward runs in its own greenlet, and a forward pre-hook on every unit pauses it there. The driver resumes
every sample that waits at the earliest unit, then moves to the next. The model's own code decides what flows from
block to block, so nothing here depends on the architecture. (Capturing the first block's inputs and replaying the
blocks is silently wrong wherever blocks differ in masks, embeddings or side inputs.)
"""

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from emloc_core.errors import EmlocError
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.parking import Parking

#: One sample: called once, in its greenlet; runs the model's forward and whatever follows (a loss, say).
Forward = Callable[[], Any]


def units(model: nn.Module, block_lists: Sequence[str]) -> list[str]:
    """Return the paths of the units: every block, and every maximal submodule that is called and holds no block list.

    Modules without parameters are not units. Nor are containers without a forward (a ModuleList of DeepStack's
    mergers), whose hook would never fire; their children are units instead. The order is that of the module tree; the
    driver visits a unit when the samples reach it.
    """
    paths: list[str] = []

    def walk(module: nn.Module, path: str) -> None:
        if path in block_lists:
            paths.extend(f"{path}.{index}" for index in range(len(list(module.children()))))
        elif type(module).forward is nn.Module.forward or any(
            block_list.startswith(f"{path}." if path else "") for block_list in block_lists
        ):
            for name, child in module.named_children():
                walk(child, f"{path}.{name}" if path else name)
        elif next(module.parameters(), None) is not None:
            paths.append(path)

    walk(model, "")
    return paths


class Lockstep:
    """Advances samples through the units of a model together.

    Args:
        units: paths of the modules at which samples pause; see :func:`units`.
        block_lists: paths of the lists of blocks, in execution order; every sample passes through the last one's.

    Attributes:
        sample: index of the running sample, for hooks on the model's modules.
        waiting: index of every sample that waits -> the arguments that it called the unit with, or what its visitor
            paused it with. They may be parked: use :meth:`arguments`.
        visiting: indices of the samples that wait at the unit being visited.
    """

    def __init__(self, model: nn.Module, units: Sequence[str], block_lists: Sequence[str], parking: Parking) -> None:
        self.model, self.units, self.parking = model, list(units), parking
        self.sample = -1
        self.waiting: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.visiting: list[int] = []
        self._driver: greenlet | None = None
        self._runners: list[greenlet] = []
        self._results: list[Any] = []
        self._around: Callable[[int], AbstractContextManager[Any]] = lambda _: nullcontext()
        self._positions: dict[int, str] = {}  # of the samples that wait
        self._inside: set[int] = set()  # samples that wait inside a block
        self._finished: set[str] = set()
        # All samples pass through the last list's blocks, whatever they passed through before.
        self._shared = {unit for unit in self.units if unit.rpartition(".")[0] == block_lists[-1]}
        # What blocks hold is made out of all samples at once; any other module may run again, and is read again.
        self._once = {unit for unit in self.units if unit.rpartition(".")[0] in block_lists}

    def advance(
        self,
        forwards: Sequence[Forward],
        visit: Callable[[str], AbstractContextManager[Any]],
        last: str | None = None,
        around: Callable[[int], AbstractContextManager[Any]] = lambda _: nullcontext(),
    ) -> list[Any]:
        """Run the samples to their end, or up to and including the unit ``last``.

        Args:
            forwards: one callable per sample. Its forward must pass ``use_cache=False``.
            visit: called with a unit's path; the samples pass through the unit within its context.
            last: path of the unit after which samples are stopped.
            around: called with a sample's index; each stretch of the sample runs within its context.

        Returns:
            What each forward returned (None for samples that were stopped).

        Raises:
            EmlocError: a sample returned to a finished block, or a forward failed.
        """
        self._driver, self._around = getcurrent(), around
        self._runners = [_start(forward) for forward in forwards]
        self._results = results = [None] * len(forwards)
        with self._hooks():
            try:
                self._drive(visit, last)
                return results
            finally:
                for runner in self._runners:
                    if not runner.dead:
                        runner.throw(GreenletExit)
                for store in (self.parking, self.waiting, self._positions, self._inside, self._finished):
                    store.clear()
                self._driver, self._runners, self._results = None, [], []

    def step(self, sample: int) -> str | None:
        """Resume a waiting sample until it waits again; return where, or None if it has ended.

        While a unit is visited, its visitor may so take samples through it by themselves.

        Raises:
            EmlocError: the sample returned to a finished block, or its forward failed.
        """
        self.sample = sample
        self.parking.leave(sample)
        self.waiting.pop(sample, None)  # its tensors are the sample's own again
        self._positions.pop(sample, None)
        runner = self._runners[sample]
        with self._around(sample):
            position = runner.switch()
        if runner.dead:
            self._results[sample] = position
            return None
        if position in self._finished and position in self._once:
            raise EmlocError(
                f"The model ran {position} a second time in one forward.",
                "Streaming needs each block to run once; declare the module that repeats as one block.",
                code="unsupported",
            )
        self._positions[sample] = position
        self._park(sample)
        return str(position)

    def pause(
        self, position: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, inside: bool = False
    ) -> None:
        """Pause the running sample at a unit, or where the unit's visitor wants it; outside a sample, do nothing.

        Args:
            args, kwargs: the arguments it waits with.
            inside: whether the pause is inside a block, where a sample holds more than at its ends.
        """
        if self._driver is not None and getcurrent() is not self._driver:
            self.waiting[self.sample] = (args, kwargs or {})
            (self._inside.add if inside else self._inside.discard)(self.sample)
            self._driver.switch(position)

    @contextmanager
    def arguments(self, sample: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Yield the arguments that a waiting sample called its unit with; it is the current sample in the context."""
        self.sample = sample
        self.parking.leave(sample)
        try:
            yield self.waiting[sample]
        finally:
            self._park(sample)

    def _park(self, sample: int) -> None:
        position, arguments = self._positions[sample], self.waiting[sample]
        inside = sample in self._inside
        # What other modules are called with may be the row's own inputs, which two samples share.
        hidden = arguments[0][0] if arguments[0] and (position in self._once or position not in self.units) else None
        self.parking.enter(sample, arguments, hidden, inside=inside)

    def _drive(self, visit: Callable[[str], AbstractContextManager[Any]], last: str | None) -> None:
        order = {unit: index for index, unit in enumerate(self.units)}
        for sample in range(len(self._runners)):
            self.step(sample)
        while self._positions:
            # Earliest unit first, so that samples that lag behind (without an image, say) catch up. Shared blocks come
            # last, since modules that images pass through first may follow them in the module tree.
            unit = min(self._positions.values(), key=lambda name: (name in self._shared, order.get(name, len(order))))
            self.visiting = sorted(sample for sample, position in self._positions.items() if position == unit)
            self._finished.add(unit)
            with visit(unit):
                for sample in self.visiting:
                    if self._positions.get(sample) == unit:  # the visitor has not taken it further
                        self.step(sample)
            if unit == last:
                break

    def _hooks(self) -> AbstractContextManager[None]:
        def pause(unit: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _module, args, kwargs: self.pause(unit, args, kwargs)

        hooks = ((self.model.get_submodule(unit), pause(unit)) for unit in self.units)
        return forward_hooks(hooks, before=True, with_kwargs=True)


def _start(forward: Forward) -> greenlet:
    runner = greenlet(forward)
    runner.gr_context = contextvars.copy_context()
    return runner
