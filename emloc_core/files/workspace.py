"""The directory that an output is built in, beside the final path, locked by one process at a time.

``.NAME.partial`` holds ``content``, which becomes ``NAME`` by one rename; ``request.json``, which says what the content
is made from; and ``lock``. Request and lock stay until ``content`` has been renamed, so that content can be identified
at any moment. Content without a request was being removed when its run was killed.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from emloc_core.errors import EmlocError
from emloc_core.files.lock import locked


def remove_at_once(directory: Path) -> None:
    """Remove a directory: after a kill all of it is there, or nothing under its name."""
    removed = directory.with_name(f".{directory.name}.removed")
    if removed.exists():  # an earlier removal was killed
        shutil.rmtree(removed)
    directory.rename(removed)
    shutil.rmtree(removed)


class Workspace:
    """The directory in which ``output`` is built."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.directory = output.with_name(f".{output.name}.partial")
        self.content = self.directory / "content"
        self.request = self.directory / "request.json"
        self._lock = self.directory / "lock"

    @property
    def is_started(self) -> bool:
        """Whether there is work from an interrupted or a running run here."""
        return self.content.is_dir() and any(self.content.iterdir())

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Create the directory and lock it against other processes.

        Raises:
            EmlocError: another process holds the lock, or the directory was not made by a stage.
        """
        with ExitStack() as stack:
            while not self._acquire(stack):
                pass
            yield

    def _acquire(self, stack: ExitStack) -> bool:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._require_own()
            stack.enter_context(locked(self._lock, wait=False))
        except FileNotFoundError:  # the previous holder has just removed the directory
            return False
        except BlockingIOError:
            raise EmlocError(
                f"Another process is writing {self.output}.", "Wait for it, or stop it.", code="busy"
            ) from None
        return True

    def _require_own(self) -> None:
        own = {path.name for path in (self.content, self.request, self._lock)}
        if others := sorted({path.name for path in self.directory.iterdir() if path.suffix != ".tmp"} - own):
            raise EmlocError(
                f"{self.directory} holds {others[0]}, which does not come from a run of this version.",
                "Move the directory elsewhere, or remove it.",
                code="exists",
            )

    def clear(self) -> None:
        """Remove the request, then the content: if killed in between, content without a request is stale."""
        self.request.unlink(missing_ok=True)
        if self.content.is_dir():
            shutil.rmtree(self.content)

    def discard(self) -> None:
        """Remove the directory. Call only while holding the lock, or when nobody holds it."""
        self.clear()
        for path in self.directory.glob(".*.tmp"):
            path.unlink()
        self._lock.unlink(missing_ok=True)
        with suppress(OSError):  # another process may have created its lock there by now
            self.directory.rmdir()

    def sweep(self) -> None:
        """Remove the leftovers of a run that was killed after its last rename, unless a process or work is here."""
        if self.directory.is_dir() and not self.content.exists():
            with suppress(EmlocError, OSError), self.hold():
                if not self.content.exists():
                    self.discard()
