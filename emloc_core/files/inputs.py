"""The files that a stage reads: their hashes, and a check before publishing that they have not changed since."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_object, write_json
from emloc_core.files.output import HASHES
from emloc_core.files.own import require_regular

#: Size, mtime, inode and ctime, which, unlike mtime, cannot be set.
Stamp = list[int]


class Inputs:
    """Hashes files, and remembers those that it has hashed.

    Hashes are cached by the file's path and stamp in ``cache_dir``, never beside the file.

    Args:
        cache_dir: directory of the cache; None caches nothing.
    """

    def __init__(self, cache_dir: Path | None = None) -> None:
        self._cache = cache_dir / HASHES if cache_dir else None
        self._hashed: dict[Path, tuple[Stamp, str]] = {}

    def hash(self, paths: Iterable[Path]) -> str:
        """Return the SHA-256 over the names and contents of files, as a hexadecimal string.

        Raises:
            EmlocError: a file is missing, or cannot be read.
        """
        cache: dict[str, Any] = {}
        if self._cache and self._cache.is_file():
            with suppress(EmlocError):  # a damaged cache is only slower
                cache = read_object(self._cache)
        cached = dict(cache)
        total = hashlib.sha256()
        for path in paths:
            try:
                require_regular(path)
                real = path.resolve()
                stamp, entry = _stamp(real), cache.get(str(real))
                if not isinstance(entry, list) or entry[:-1] != stamp or not isinstance(entry[-1], str):
                    cache[str(real)] = entry = [*stamp, _digest(real)]
            except FileNotFoundError:
                raise EmlocError(
                    f"{path} does not exist.", "Download or copy the model again.", code="missing"
                ) from None
            except (OSError, RuntimeError) as error:
                reason = getattr(error, "strerror", None) or error
                raise EmlocError(
                    f"{path} cannot be read ({reason}).", "Download or copy it again.", code="unavailable"
                ) from None
            self._hashed.setdefault(real, (stamp, entry[-1]))
            total.update(f"{path.name}\0{entry[-1]}\n".encode())
        # Never create the directory: fingerprints are also taken where nothing will be written.
        if self._cache and cache != cached and os.access(self._cache.parent, os.W_OK):
            with suppress(OSError):  # without a cache it is only slower
                write_json(self._cache, cache)
        return total.hexdigest()

    @property
    def stamps(self) -> list[Stamp]:
        """Stamps that tell whether these are the same files as in an interrupted run, wherever they are now."""
        return [stamp[:-1] for stamp, _ in self._hashed.values()]

    def verify(self) -> None:
        """Refuse files that have changed since they were hashed, so that everything read since is consistent."""
        for path, (stamp, digest) in self._hashed.items():
            try:
                now = _stamp(path)
                # A new hard link or other permissions change only the ctime.
                same = now == stamp or (now[:-1] == stamp[:-1] and _digest(path) == digest)
            except OSError:
                same = False
            if not same:
                raise EmlocError(
                    f"{path} was changed while it was being read; the output made from it is dropped.",
                    "Run the same command again, and leave the file alone until it ends.",
                    code="changed",
                )


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
