"""The outcome of an attempt at a job. A worker leaves it beside the job file, as JSON."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_object

Cause = Literal[
    "out of memory", "input/output", "bad input", "time limit", "disk", "crash", "lost worker", "interrupted"
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
OUTCOME = "result.json"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        cause: of a failure; None is success.
        message: what happened and where, for a person.
        stage: the output that was being made, where known: ``emulator``, ``adapter``, ...
        result: of a success; see :func:`emloc_core.zoo.jobs.result.collect`.
    """

    cause: Cause | None
    message: str = ""
    stage: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    host: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def read_outcome(directory: Path) -> Outcome | None:
    """Return what a worker wrote of how it ended; None where it wrote nothing."""
    with suppress(EmlocError, TypeError):
        return Outcome(**read_object(directory / OUTCOME))
    return None
