"""The base of all stages: a job is checked when it is constructed, and then described or run."""

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from emloc_core.files.output import Output


class Progress(Protocol):
    """Reports progress: the item just done, the number done, the total, and for optimiser steps the loss."""

    def __call__(self, item: str, done: int, total: int, loss: float | None = None, /) -> None:
        """Report an item."""


class Job:
    """A stage whose request has passed the cheap checks, which its constructor does.

    Attributes:
        is_main_process: whether this process writes the output; others help it. Until they find each other, each does.
    """

    is_main_process = True

    @property
    def warnings(self) -> list[str]:
        """What the user has to know before it runs: sentences without a full stop."""
        return []

    @cached_property
    def output(self) -> Output:
        """The output's directory. The files of all inputs are hashed on first access."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return what it would do, as JSON values. Writes only hashes of large files, which are cached."""
        raise NotImplementedError

    def run(self, progress: Any = lambda *_: None) -> Path:
        """Make the output unless it is finished, resuming an interrupted run; return its directory."""
        if not self.output.is_finished():
            with self.output.build() as staging:
                self.make(staging, progress)
        return self.output.path

    def make(self, staging: Path, progress: Progress) -> None:
        """Write the output's files, and set what :class:`~emloc_core.files.output.Output` records.

        Args:
            staging: directory to write into; it may hold an interrupted run's files.
        """
        raise NotImplementedError
