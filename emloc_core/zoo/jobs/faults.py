"""Classifies a failed attempt, from an exception or from how a process ended. The driver decides what follows."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from emloc_core.errors import DISK_FULL, EmlocError, class_names, is_out_of_memory
from emloc_core.zoo.jobs.outcome import Cause, Outcome

#: Errors that another try would not change.
_WRONG = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
#: Errors of libraries for damaged files.
_DAMAGED = {"SafetensorError", "JSONDecodeError", "UnicodeDecodeError"}
#: Errors of the hub's client for a name that does not exist, or must not be accessed.
_NOT_THERE = {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "GatedRepoError",
              "HFValidationError", "OfflineModeIsEnabled"}  # fmt: skip
#: The file is not here, and the hub could not be reached.
_UNREACHED = "LocalEntryNotFoundError"


def classify(error: BaseException, *, offline: bool = False) -> Cause:
    """Return the cause of an exception, by its own type and by those of the exceptions that led to it.

    Args:
        offline: nothing could be fetched, so a file that is missing now will be missing next time.
    """
    chain = list(_chain(error))
    names = {name for exception in chain for name in class_names(exception)}
    no_room = any(
        getattr(exception, "code", None) == "disk-full" or getattr(exception, "errno", None) in DISK_FULL
        for exception in chain
    )
    # The first that holds: "not in the cache" is derived from "no such file", and that from OSError.
    candidates: list[tuple[Cause, bool]] = [
        ("out of memory", any(map(_ran_out, chain))),
        ("disk", no_room),
        ("bad input", offline and _UNREACHED in names),
        ("input/output", _UNREACHED in names),
        ("bad input", bool(names & (_NOT_THERE | _DAMAGED))),
        (
            "input/output",
            any(isinstance(exception, OSError) and not isinstance(exception, _WRONG) for exception in chain),
        ),
        (
            "bad input",
            any(isinstance(exception, (EmlocError, *_WRONG)) for exception in chain) or "ClickException" in names,
        ),
    ]
    return next((cause for cause, holds in candidates if holds), "crash")


def _ran_out(error: BaseException) -> bool:
    """Return whether memory ran out during a stage, rather than a plan that does not fit."""
    of_a_stage = isinstance(error, EmlocError) and error.code == "memory" and error.resumable
    return of_a_stage or is_out_of_memory(error)


def describe(error: BaseException) -> str:
    """Return what an exception says in a line or two, with its type where it is not for users."""
    text = str(error).strip() or "no message"
    return text if isinstance(error, EmlocError) else f"{type(error).__name__}: {text.splitlines()[0]}"


def ended(code: int, kills_before: int, process: str) -> Outcome:
    """Return the outcome of a process that wrote none, from its exit code or the negative signal that ended it.

    Args:
        code: as ``Popen.returncode``.
        kills_before: :func:`memory_kills` before it started.
        process: what ended, for the message.
    """
    if code >= 0:
        return Outcome("crash", f"{process} ended with exit code {code}; its log says more.")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if code == -signal.SIGKILL and memory_kills() > kills_before:
        return Outcome("out of memory", f"{process} was killed by the kernel, which had run out of memory.")
    lost = -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    return Outcome("lost worker" if lost else "crash", f"{process} was killed by {name}.")


def memory_kills() -> int:
    """Return how many processes the kernel's OOM killer has ended, on the machine and in this control group."""
    total = 0
    for file in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with contextlib.suppress(OSError, ValueError):
            lines = Path(file).read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return total


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that led to it. A suppressed context (``from None``) does not count."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
