"""Python: what it does at the end of a process before it frees what is there."""

import atexit
import threading


def run_exit_functions() -> None:
    """Wait for threads, and call what was registered with :mod:`atexit`, as Python does it."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
