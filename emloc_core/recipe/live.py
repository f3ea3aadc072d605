"""What a run is doing now: a file in its directory while it runs, which ``emloc report --serve`` shows."""

import math
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json, write_json
from emloc_core.stages.progress import ProgressEvent

FILE = "progress.json"
#: Seconds between two writes.
_EVERY = 1.0


@dataclass
class Doing:
    """The running stage.

    Attributes:
        started: seconds since the epoch.
        losses: step and loss of every log entry so far.
        pid: process that runs the recipe.
    """

    name: str
    purpose: str
    event: ProgressEvent
    started: float = field(default_factory=time.time)
    losses: list[tuple[int, float]] = field(default_factory=list)
    pid: int = field(default_factory=os.getpid)


class Live:
    """Keeps the file up to date during a run, and removes it at the end."""

    def __init__(self, directory: Path) -> None:
        self._file, self._written = directory / FILE, 0.0
        self._doing: Doing | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)

    def begin(self, doing: Doing) -> None:
        """Begin a stage."""
        self._doing, self._written = doing, 0.0
        self.update(doing.event)

    def update(self, event: ProgressEvent) -> None:
        """Write an event, unless one was written a moment ago. A full disk does not end the run."""
        assert self._doing is not None
        if event.loss is not None and not math.isfinite(event.loss):
            event = replace(event, loss=None)
        losses = self._doing.losses
        if event.loss is not None and (not losses or losses[-1][1] != event.loss):
            losses.append((event.step, event.loss))
        self._doing.event = event
        now = time.monotonic()
        if now - self._written >= _EVERY:
            self._written = now
            with suppress(OSError):
                write_json(self._file, asdict(self._doing))


def doing(directory: Path) -> Doing | None:
    """Return what a run is doing, or None if none is running there."""
    try:
        content: dict[str, Any] = read_json(directory / FILE)
        stage = Doing(**{**content, "event": ProgressEvent(**content["event"])})
        os.kill(stage.pid, 0)  # raises if there is no such process
    except PermissionError:  # the process exists, but is another user's
        return stage
    except (EmlocError, OSError, OverflowError, KeyError, TypeError):
        return None
    return stage
