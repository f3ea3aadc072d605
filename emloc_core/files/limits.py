"""Limits on the time and memory of work that untrusted files cause: rendering a template, building a model.

Time is limited by an alarm, whose handler raises between two Python instructions, in the main thread only; memory by
the kernel, which refuses allocations beyond the limit (Linux). Both are restored afterwards.
"""

import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.files.meter import own_memory


@contextmanager
def limited(work: str, seconds: float, nbytes: int) -> Iterator[None]:
    """Limit the time and memory of the ``with`` block.

    Args:
        work: as the subject of a sentence: ``Rendering the chat template``.

    Raises:
        EmlocError: it takes more.
    """
    try:
        with _within(seconds, work), _allocating(nbytes):
            yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch's
            raise
        raise EmlocError(
            f"{work} takes more than {nbytes >> 20} MiB of memory, or more than is free.",
            "Free some memory. If enough is free, do not use the file: it is damaged or malicious.",
            code="refused",
        ) from error  # the zoo tries again smaller where memory ran out


@contextmanager
def unpacking(paths: Iterable[Path]) -> Iterator[None]:
    """Bound the time and memory of reading compressed files: a small one may unpack to gigabytes.

    Raises:
        EmlocError: as :func:`limited`.
    """
    paths = list(paths)
    size = sum(path.stat().st_size for path in paths)
    with limited(f"Reading {', '.join(map(str, paths))}", _SECONDS, max(_LEAST, _EXPANSION * size)):
        yield


#: Unpacked content may take so many times the bytes of its files, or so many bytes; and so many seconds.
_EXPANSION, _LEAST, _SECONDS = 100, 2 << 30, 3600.0
_FIX = "Do not use it: it is damaged or malicious."


@contextmanager
def _within(seconds: float, work: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    running = True

    def stop(_signal: int, _frame: Any) -> None:
        if running:
            raise EmlocError(f"{work} takes more than {seconds:g} seconds.", _FIX, code="refused")

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)  # repeated, since the error may be caught
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _allocating(nbytes: int) -> Iterator[None]:
    used = own_memory("VmData")  # which counts against the limit
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if used is None or 0 <= soft <= used + nbytes:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (used + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
