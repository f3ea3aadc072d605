"""Classifies a failed attempt, from an exception or from how a process ended. The driver decides what follows."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from emloc_core.errors import DISK_FULL, EmlocError, class_names, is_out_of_memory
from emloc_core.zoo.jobs.outcome import CAUSES, Cause, Outcome

#: Exit codes of workers and stages say the cause, in case there is no room for more.
_FIRST_CODE = 10
#: Nothing that another try would change.
_WRONG = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
#: Files that are not what they should be, as their libraries say it.
_DAMAGED = {"SafetensorError", "JSONDecodeError", "UnicodeDecodeError"}
#: What the hub says of a name that it does not have, or that must not be asked for.
_NOT_THERE = {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "GatedRepoError",
              "HFValidationError", "OfflineModeIsEnabled"}  # fmt: skip
#: It is not here, and the hub could not be asked.
_UNREACHED = "LocalEntryNotFoundError"


def classify(error: BaseException, *, offline: bool = False) -> Cause:
    """Return the cause that an exception, or one that it came from, tells of.

    Args:
        offline: nothing could be fetched, so that what is not here will not be here next time.
    """
    chain = list(_chain(error))
    names = {name for each in chain for name in class_names(each)}
    no_room = any(
        getattr(each, "code", None) == "disk-full" or getattr(each, "errno", None) in DISK_FULL for each in chain
    )
    # The first that holds: "not in the cache" is derived from "no such file", and that from OSError.
    found: list[tuple[Cause, bool]] = [
        ("out of memory", any(map(_ran_out, chain))),
        ("disk", no_room),
        ("bad input", offline and _UNREACHED in names),
        ("input/output", _UNREACHED in names),
        ("bad input", bool(names & (_NOT_THERE | _DAMAGED))),
        ("input/output", any(isinstance(each, OSError) and not isinstance(each, _WRONG) for each in chain)),
        ("bad input", any(isinstance(each, (EmlocError, *_WRONG)) for each in chain) or "ClickException" in names),
    ]
    return next((cause for cause, holds in found if holds), "crash")


def _ran_out(error: BaseException) -> bool:
    """Return whether memory ran out during a stage, rather than a plan that does not fit."""
    of_a_stage = isinstance(error, EmlocError) and error.code == "memory" and error.resumable
    return of_a_stage or is_out_of_memory(error)


def describe(error: BaseException) -> str:
    """Return what an exception says in a line or two, with its type where it is not for users."""
    said = str(error).strip() or "no message"
    return said if isinstance(error, EmlocError) else f"{type(error).__name__}: {said.splitlines()[0]}"


def ended(code: int, kills_before: int, what: str) -> Outcome:
    """Return the outcome of a process that left none behind: by its exit code, or the negative signal that ended it.

    Args:
        code: as ``Popen.returncode``.
        kills_before: :func:`memory_kills` before it started.
        what: the process, for the message.
    """
    if code >= 0:
        index = code - _FIRST_CODE
        if 0 <= index < len(CAUSES):
            said = f"{what} reported this only by its exit code ({code}); its log may say more."
            remedy = " The disk is full: free some space." if CAUSES[index] == "disk" else ""
            return Outcome(CAUSES[index], said + remedy)
        return Outcome("crash", f"{what} ended with exit code {code}; its log says more.")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if code == -signal.SIGKILL and memory_kills() > kills_before:
        return Outcome("out of memory", f"{what} was killed by the kernel, which had run out of memory.")
    lost = -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    return Outcome("lost worker" if lost else "crash", f"{what} was killed by {name}.")


def exit_code(cause: Cause | None) -> int:
    """Return the exit code that :func:`ended` understands."""
    return 0 if cause is None else _FIRST_CODE + CAUSES.index(cause)


def memory_kills() -> int:
    """Return how many processes the kernel has ended for want of memory, on the machine and in this control group."""
    total = 0
    for file in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with contextlib.suppress(OSError, ValueError):
            lines = Path(file).read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return total


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that it came from. A context that was left behind (``from None``) does not count."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
