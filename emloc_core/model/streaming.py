"""Runs a model that does not fit in memory: ordinary forwards of all samples, one unit of weights at a time.

The driver loads a unit, advances every sample that waits at it, frees the unit, and continues with the next
(:mod:`emloc_core.model.lockstep`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from emloc_core import devices
from emloc_core.compat.transformers import attending
from emloc_core.model.lockstep import Forward, Lockstep, units
from emloc_core.model.parking import Parking
from emloc_core.model.skeleton import Skeleton
from emloc_core.model.weights import FrozenWeights


class Stream(Lockstep):
    """A streamed pass of many samples over a skeleton.

    Args:
        parking: storage for the tensors of waiting samples; by default the skeleton's device while there is room.
    """

    def __init__(self, skeleton: Skeleton, parking: Parking | None = None) -> None:
        model, lists = skeleton.model, skeleton.block_lists
        parking = parking or Parking.on(skeleton.device, model.buffers())
        super().__init__(model, units(model, lists), lists, parking)
        self.skeleton = skeleton

    @property
    def pins(self) -> bool:
        """Whether units pass through pinned memory: where copies run beside computing."""
        return devices.copies_alongside(self.skeleton.device)

    def run(
        self, forwards: Sequence[Forward], visit: Callable[[str], Any] | None = None, last: str | None = None
    ) -> list[Any]:
        """Run the samples as :meth:`advance` does, without gradients.

        Args:
            visit: called with a unit's path when its weights are loaded; returns a context manager that is entered
                while the samples pass through the unit, or None.
        """
        try:
            with torch.no_grad(), self._loading() as load, attending(self._know):

                @contextmanager
                def loaded(unit: str) -> Iterator[None]:
                    load(unit)
                    parameters = self.skeleton.model.get_submodule(unit).parameters()
                    context = visit(unit) if visit else None
                    with self.parking.keeping(parameters), context or nullcontext():
                        yield
                    self.skeleton.free(unit)

                outside = self.skeleton.outside(self.units)
                self.skeleton.load_parameters(outside)
                self.parking.keep(self.skeleton.model.get_parameter(name) for name in outside)
                return self.advance(forwards, loaded, last)
        finally:
            for unit in self.units:
                self.skeleton.free(unit)

    def _know(self, *attended: torch.Tensor) -> None:
        self.parking.know(self.sample, *attended)

    @contextmanager
    def _loading(self) -> Iterator[Callable[[str], None]]:
        """Yield a function that loads a unit, while the next one is read in the background.

        On the CPU it is read into the page cache; for a GPU into pinned memory, and copied as one when it is asked for,
        so that there is one unit on the GPU.
        """
        if not self.pins:
            following = dict(zip(self.units, self.units[1:], strict=False))

            def load(unit: str) -> None:
                self.skeleton.load(unit)
                if unit in following:
                    self.skeleton.read_ahead(following[unit])

            yield load
            return
        weights = FrozenWeights(self.skeleton.apart, self.units, self.skeleton.device, begins=False)
        weights.expect(self.units)
        try:
            yield lambda unit: self.skeleton.lend(unit, weights.parameters(unit))
        finally:
            weights.close()
