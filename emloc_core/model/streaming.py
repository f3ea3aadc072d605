"""Runs a model that does not fit in memory: every sample's ordinary forward, one unit of weights at a time.

Each sample's ``model.forward`` runs in a greenlet of its own, and a forward pre-hook on every unit that owns weights
pauses it there. The driver loads a unit, resumes every sample that waits at it, frees the unit, goes on. The model's
own code decides what flows from block to block, so nothing here knows any architecture. (Catching the first block's
inputs and replaying the blocks is silently wrong wherever blocks differ in masks, embeddings or side inputs.)
"""

import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from emloc_core.errors import EmlocError
from emloc_core.model.parking import Parking
from emloc_core.model.skeleton import Skeleton

#: One sample: called once, in its greenlet; runs the model's forward and whatever follows (a loss, say).
Forward = Callable[[], Any]


def units(model: nn.Module, block_lists: Sequence[str]) -> list[str]:
    """Return the paths of the units: every block, and every maximal submodule that is called and holds no block list.

    Modules without parameters are no units, nor are containers without a forward (a ModuleList of DeepStack's
    mergers), whose hook would never fire: their children are. The order is that of the module tree; the driver visits a
    unit when the samples reach it.
    """
    found: list[str] = []

    def walk(module: nn.Module, path: str) -> None:
        if path in block_lists:
            found.extend(f"{path}.{index}" for index in range(len(list(module.children()))))
        elif type(module).forward is nn.Module.forward or any(
            block_list.startswith(f"{path}." if path else "") for block_list in block_lists
        ):
            for name, child in module.named_children():
                walk(child, f"{path}.{name}" if path else name)
        elif next(module.parameters(), None) is not None:
            found.append(path)

    walk(model, "")
    return found


class Stream:
    """A streamed pass of many samples over a skeleton.

    Args:
        skeleton: the model.
        block_lists: module paths of the lists of blocks, in execution order.
        parking: where waiting samples keep their tensors; None: on the skeleton's device while there is room.

    Attributes:
        sample: index of the sample that is running; hooks on the model's modules read it.
        waiting: index of every sample that waits at a unit -> the arguments that it called the unit with; use
            :meth:`arguments`, since they may be parked.
        here: indices of the samples that wait at the unit that is being visited.
    """

    def __init__(self, skeleton: Skeleton, block_lists: Sequence[str], parking: Parking | None = None) -> None:
        self.skeleton = skeleton
        self.parking = parking or Parking.on(skeleton.device, skeleton.model.buffers())
        self.units = units(skeleton.model, block_lists)
        self.sample = -1
        self.waiting: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.here: list[int] = []
        # The blocks of the last list: every sample passes through them, whatever it has passed through before.
        self._shared = {unit for unit in self.units if unit.rpartition(".")[0] == block_lists[-1]}
        owned = tuple(f"{unit}." for unit in self.units)
        self._resident = [name for name, _ in skeleton.model.named_parameters() if not name.startswith(owned)]

    def run(
        self, forwards: Sequence[Forward], visit: "Callable[[str], Any] | None" = None, last: str | None = None
    ) -> list[Any]:
        """Run the samples to their end, or up to and including the unit ``last``.

        Args:
            forwards: one callable a sample. Its forward must pass ``use_cache=False``.
            visit: called with a unit's path when its weights are loaded; returns a context manager that is entered
                while the samples pass through the unit, or None.
            last: path of the unit after which samples are stopped.

        Returns:
            What each forward returned (None for samples that were stopped).

        Raises:
            EmlocError: a sample came back to a unit that was finished with, or the forward failed.
        """
        with self._hooks(), torch.no_grad():
            if self._resident:
                self.skeleton.load_parameters(self._resident)
            runners = [self._start(forward) for forward in forwards]
            try:
                return self._drive(runners, visit, last)
            finally:
                for runner in runners:
                    if not runner.dead:
                        runner.throw(GreenletExit)
                self.parking.clear()
                self.waiting.clear()
                for unit in self.units:
                    self.skeleton.free(unit)

    @contextmanager
    def arguments(self, sample: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Lend the arguments that a waiting sample called its unit with, and be that sample for the time."""
        self.sample = sample
        self.parking.leave(sample)
        try:
            yield self.waiting[sample]
        finally:
            self.parking.enter(sample, self.waiting[sample])

    def _start(self, forward: Forward) -> greenlet:
        runner = greenlet(forward)
        runner.gr_context = contextvars.copy_context()
        return runner

    def _drive(self, runners: list[greenlet], visit: Callable[[str], Any] | None, last: str | None) -> list[Any]:
        order = {unit: index for index, unit in enumerate(self.units)}
        results: list[Any] = [None] * len(runners)
        parked: dict[str, list[int]] = {}
        finished: set[str] = set()

        def advance(indices: Iterable[int]) -> None:
            for index in indices:
                self.sample = index
                self.parking.leave(index)
                self.waiting.pop(index, None)  # its tensors are the sample's own again
                state = runners[index].switch()
                if runners[index].dead:
                    results[index] = state
                elif state in finished:
                    raise EmlocError(
                        f"The model ran {state} a second time in one forward.",
                        "Streaming needs each block to run once; declare the module that repeats as one block.",
                    )
                else:
                    parked.setdefault(state, []).append(index)
                    self.parking.enter(index, self.waiting[index])

        advance(range(len(runners)))
        while parked:
            # The earliest unit first, so that samples that lag behind (no image, say) catch up with the others; what
            # all pass through last of all, since the module tree may have behind it what an image comes through first.
            unit = min(parked, key=lambda name: (name in self._shared, order[name]))
            self.here = waiting = parked.pop(unit)
            self.skeleton.load(unit)
            for following in self.units[order[unit] + 1 : order[unit] + 2]:
                self.skeleton.read_ahead(following)
            with ExitStack() as stack:
                context = visit(unit) if visit else None
                if context is not None:
                    stack.enter_context(context)
                finished.add(unit)
                advance(waiting)
            self.skeleton.free(unit)
            if unit == last:
                break
        return results

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        driver = getcurrent()

        def pause(unit: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
                if getcurrent() is not driver:
                    self.waiting[self.sample] = (args, kwargs)
                    driver.switch(unit)

            return hook

        model = self.skeleton.model
        handles = [
            model.get_submodule(unit).register_forward_pre_hook(pause(unit), with_kwargs=True) for unit in self.units
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
