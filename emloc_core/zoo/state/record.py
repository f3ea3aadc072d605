"""A job's record in the store."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.task import Demand

State = Literal["waiting", "running", "done", "failed", "duplicate", "interrupted"]


@dataclass(frozen=True)
class Attempt:
    """One try at a job.

    Attributes:
        number: from 1.
        started: seconds since the epoch.
        seconds: how long it took; None while it runs.
        cause: why it failed; None if it succeeded or still runs.
        message: what happened, and what follows.
        log: the log's path in the zoo.
        host: where it ran; empty if not known.
    """

    number: int
    started: float
    seconds: float | None
    cause: str | None
    message: str
    log: str
    host: str


@dataclass(frozen=True)
class JobRecord:
    """What the zoo knows of a job.

    Attributes:
        state: ``interrupted`` if it is running in the store without a driver; the next driver resumes it.
        job: as it is now tried, made smaller if memory ran out.
        duplicate_of: the job of the same fingerprint that is done instead.
        needs: what it needs according to the plan; None before it is planned.
        result: what a finished job made; see :func:`emloc_core.zoo.jobs.outcome.collect`.
    """

    job: ZooJob
    fingerprint: str
    state: State
    duplicate_of: str | None = None
    needs: Demand | None = None
    result: dict[str, Any] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"name": self.job.name, **to_jsonable_python(self)}
