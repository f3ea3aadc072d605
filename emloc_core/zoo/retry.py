"""Decides by its cause whether a failure is worth another attempt."""

from dataclasses import dataclass

from emloc_core.zoo.jobs.job import ZooJob, describe_change
from emloc_core.zoo.jobs.outcome import Outcome


@dataclass(frozen=True)
class Limits:
    """Limits of a driver.

    Attributes:
        retries: attempts after the first.
        time: seconds per attempt; None for no limit.
        backoff: seconds before the second try after an input or output error; doubled before each further one.
        elsewhere: outputs go to a storage, so the free space of the zoo's disk does not matter.
    """

    retries: int = 2
    time: float | None = None
    backoff: float = 2.0
    elsewhere: bool = False


@dataclass(frozen=True)
class Retry:
    """Whether and how a job is tried again.

    Attributes:
        delay: seconds until then.
        smaller: the job as it is then tried, if it is made smaller.
    """

    again: bool
    note: str = ""
    delay: float = 0.0
    smaller: ZooJob | None = None


def after(outcome: Outcome, job: ZooJob, failures: int, limits: Limits, *, shared: bool = False) -> Retry:
    """Return what to do after a failure.

    Out of memory: again, alone if others may have taken it, else smaller if that is possible. Input and output:
    again after a while. A lost worker: again at once. The time limit: once more, since a job resumes where it stopped.
    Bad input, a full disk, a crash: not again.

    Args:
        failures: attempts that failed before, interruptions aside.
        shared: other jobs ran in the same memory when it ended.
    """
    if failures >= limits.retries:
        return Retry(False)
    if outcome.cause == "out of memory" and shared:
        return Retry(True, "Retrying it alone: other jobs ran at the same time.")
    if outcome.cause == "out of memory":
        smaller = job.smaller(outcome.stage)
        note = f"Retrying it smaller: {describe_change(job, smaller)}." if smaller else "It cannot be made smaller."
        return Retry(smaller is not None, note, smaller=smaller)
    if outcome.cause == "input/output":
        delay = limits.backoff * 2**failures
        return Retry(True, f"Retrying after {delay:g} s.", delay)
    again = outcome.cause == "lost worker" or (outcome.cause == "time limit" and failures == 0)
    return Retry(again, "Retrying from where it stopped." if again else "")
