"""Seconds of stage 1 by phase, measured by wrapping the functions that do each."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

#: In the order in which they are shown. The forwards are those of the base and of the emulator.
PHASES = ("hashing", "reading", "base forward", "emulator forward", "Grams", "fitting", "writing", "else")


class Phases:
    """Seconds by phase. A phase that calls another does not count the other's time; other threads are not counted.

    Args:
        wait: waits until the device is done.
    """

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._wait, self._running = wait, ["else"]
        self._since, self._thread = time.perf_counter(), threading.get_ident()

    def lap(self) -> None:
        """Count the time since the last lap to the phase that runs."""
        self._wait()
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def lapped(self) -> dict[str, float]:
        """Return the seconds of every phase since the last call."""
        self.lap()
        return {phase: self.seconds.pop(phase, 0.0) for phase in PHASES}

    def timed(self, work: Callable[..., Any], phase: Callable[..., str]) -> Callable[..., Any]:
        """Return a function whose time counts to the phase that ``phase`` names for its arguments."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return work(*args, **kwargs)
            self.lap()
            self._running.append(phase(*args, **kwargs))
            try:
                return work(*args, **kwargs)
            finally:
                self.lap()
                self._running.pop()

        return run


@contextmanager
def measured(rows: int, wait: Callable[[], Any] = lambda: None) -> Iterator[Phases]:
    """Measure what stage 1 does in the ``with`` block.

    Args:
        rows: calibration rows. Samples of that index and above pass through the emulator.
        wait: waits until the device is done.
    """
    from emloc_core.algorithms.statistics import Gram
    from emloc_core.emulator.decompose import Decomposition
    from emloc_core.emulator.files import EmulatorFiles
    from emloc_core.emulator.propagation import PairedMoments
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.model.skeleton import Skeleton
    from emloc_core.model.streaming import Stream
    from emloc_core.model.weights import FrozenWeights

    phases = Phases(wait)
    work: dict[str, list[tuple[type, str]]] = {
        "hashing": [(Checkpoint, "fingerprint")],
        "reading": [(Skeleton, "load_parameters"), (FrozenWeights, "parameters")],
        "Grams": [(Gram, "add"), (Gram, "_flush"), (PairedMoments, "add"), (PairedMoments, "_flush")],
        "fitting": [(PairedMoments, "fit"), (PairedMoments, "gram_for"), (Decomposition, "_fit")],
        "writing": [(EmulatorFiles, "write"), (EmulatorFiles, "finish")],
    }
    with ExitStack() as stack:

        def wrap(owner: type, name: str, phase: Callable[..., str]) -> None:
            stack.enter_context(patch.object(owner, name, phases.timed(getattr(owner, name), phase)))

        for phase, functions in work.items():
            for owner, name in functions:
                wrap(owner, name, lambda *_args, phase=phase: phase)
        wrap(Stream, "step", lambda _stream, sample: "base forward" if sample < rows else "emulator forward")
        yield phases
