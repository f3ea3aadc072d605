"""Progress of a stage as objects, for programs that embed EMLoC."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.files.meter import Meter, peak_memory

_LOGGER = logging.getLogger("emloc.progress")


@dataclass(frozen=True)
class ProgressEvent:
    """What a stage has done so far.

    Attributes:
        stage: its name: ``compress``, ``train``, ...
        output: its output directory.
        step: blocks, optimiser steps, Linears, shards or systems that are done.
        total: how many there are.
        what: the one just done, as text.
        loss: in nats per token, of the steps up to the last entry of the log; None before it, and for other stages.
        seconds_left: an estimate, in seconds; None before the first is done.
        peak_bytes: largest memory of the process so far, or of the fullest GPU.
        number: which stage of a run this is, from 1.
        stages: how many stages the run has.
    """

    stage: str
    output: str
    step: int
    total: int
    what: str = ""
    loss: float | None = None
    seconds_left: float | None = None
    peak_bytes: int | None = None
    number: int = 1
    stages: int = 1


class Pace:
    """Estimates how long the rest takes from what this process has done itself: a run may have resumed."""

    def __init__(self) -> None:
        self._before: int | None = None

    def remaining(self, seconds: float, done: int, total: int) -> float | None:
        """Return the seconds that are left, or None if that is not known yet.

        Args:
            seconds: seconds since the beginning.
            done: items that are done, including earlier processes'.
        """
        if self._before is None:
            self._before = max(0, done - 1)
        completed = done - self._before
        return seconds / completed * (total - done) if completed > 0 else None


class Reporter:
    """Makes an event of each report of a job."""

    def __init__(self, stage: str, output: Path, tell: Callable[[ProgressEvent], Any]) -> None:
        self._stage, self._output, self._tell = stage, str(output), tell
        self._meter, self._pace = Meter(), Pace()

    def __call__(self, item: str, done: int, total: int, loss: float | None = None, /) -> None:
        """Report an item; see :class:`emloc_core.files.job.Progress`."""
        reading = self._meter.read()
        seconds_left = self._pace.remaining(reading["seconds"], done, total)
        _LOGGER.debug("%s: %d of %d (%s)", self._stage, done, total, item)
        event = ProgressEvent(self._stage, self._output, done, total, item, loss, seconds_left, peak_memory(reading))
        self._tell(event)
