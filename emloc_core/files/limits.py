"""Bounds on the time and memory of what a file of somebody else makes a library do: render a template, build a model.

Time is bounded by an alarm, whose handler raises between two steps of Python, and in the main thread alone; memory by
the kernel, which refuses what is asked for beyond the bound (Linux). Both are as they were afterwards.
"""

import contextlib
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError

_STATUS = Path("/proc/self/status")


@contextmanager
def limited(what: str, seconds: float, nbytes: int) -> Iterator[None]:
    """Bound the time and memory of the ``with`` block.

    Args:
        what: is done, as the subject of a sentence: ``Rendering the chat template``.
        seconds: it may take.
        nbytes: that it may allocate.

    Raises:
        EmlocError: it takes more.
    """
    try:
        with _within(seconds, what), _allocating(nbytes):
            yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch's
            raise
        raise EmlocError(f"{what} takes more than {nbytes >> 20} MiB of memory.", _FIX) from None


_FIX = "Do not use it: it is damaged, or made to ask for so much."


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    running = True

    def stop(_signal: int, _frame: Any) -> None:
        if running:
            raise EmlocError(f"{what} takes more than {seconds:g} seconds.", _FIX)

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)  # again: what is raised may be caught
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _allocating(nbytes: int) -> Iterator[None]:
    used = _private_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if used is None or 0 <= soft <= used + nbytes:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (used + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _private_memory() -> int | None:
    """Return the bytes that count against RLIMIT_DATA; None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    return None
