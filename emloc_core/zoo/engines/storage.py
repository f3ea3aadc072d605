"""Storage that all nodes of a cluster reach, by URL: any file system that fsspec knows.

A directory there is complete when it has its marker, the file that is written last; ``emloc.json`` for an output.
"""

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from emloc_core.errors import EmlocError, typed_line
from emloc_core.files.manifest import MANIFEST

INPUTS = "inputs"
_COMPLETE = ".whole"  # marks a complete copy of something without a manifest


@contextmanager
def _os_errors() -> Iterator[None]:
    """Turn a file system's own exceptions, such as its HTTP library's, into an ``OSError``, which is retried."""
    try:
        yield
    except (OSError, EmlocError):
        raise
    except Exception as error:
        raise OSError(f"The storage failed ({typed_line(error)}).") from error


class Storage:
    """A directory by URL.

    Args:
        url: ``s3://bucket/zoo``, ``file:///shared/zoo``, ...

    Raises:
        EmlocError: no file system is installed for it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.files, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise EmlocError(
                f"{url} cannot be used as storage ({error}).",
                "Give a URL that fsspec knows, and install its plugin for that: s3fs for s3://, say.",
            ) from None
        self.root = root.rstrip("/")
        self._is_local = isinstance(self.files, LocalFileSystem)

    @_os_errors()
    def has(self, name: str, marker: str = MANIFEST) -> bool:
        """Say whether a directory is there, complete."""
        # Another process writes there too, so earlier listings do not count.
        self.files.invalidate_cache()
        return bool(self.files.isfile(self._path(name, marker)))

    @_os_errors()
    def publish(self, source: Path, name: str, marker: str = MANIFEST) -> None:
        """Copy a directory, or a file into one, unless it is there already: complete files, and ``marker`` last."""
        if self.has(name, marker):
            return
        base = source if source.is_dir() else source.parent
        files = {path.relative_to(base).as_posix(): path for path in _files(source)}
        for relative in sorted(files.keys() - {marker}):
            self._put(files[relative], self._path(name, relative))
        for path in self.files.find(self._path(name)):  # left by an attempt that was killed
            if path.removeprefix(f"{self._path(name)}/") not in files:
                self.files.rm_file(path)
        if marker in files:
            self._put(files[marker], self._path(name, marker))
        else:
            self.write(f"{name}/{marker}", b"")

    @_os_errors()
    def fetch(self, name: str, target: Path, marker: str = MANIFEST) -> None:
        """Copy a complete directory to ``target``, which appears when it is complete too.

        Raises:
            EmlocError: a name in the storage leads out of the directory.
            OSError: it is not there, or cannot be read.
        """
        if not self.has(name, marker):
            raise FileNotFoundError(f"{self.url} has no complete {name}.")
        incoming = target.with_name(f".{target.name}.incoming")
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        base = self._path(name)
        for path in self.files.find(base):
            destination = incoming / path.removeprefix(base).lstrip("/")
            if not destination.resolve().is_relative_to(incoming.resolve()):
                raise EmlocError(f"{path} in {self.url} leads out of its directory.", "Do not use this storage.")
            destination.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(path, str(destination))
        os.rename(incoming, target)

    @_os_errors()
    def write(self, name: str, content: bytes) -> None:
        """Write a file: a reader sees the old one or the new one."""
        target = self._path(name)
        with self._replacing(target) as partial:
            self.files.pipe_file(partial, content)

    @_os_errors()
    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        self.files.invalidate_cache()
        return bytes(self.files.cat_file(self._path(name)))

    def _put(self, source: Path, target: str) -> None:
        with self._replacing(target) as partial:
            self.files.put_file(str(source), partial)

    @contextmanager
    def _replacing(self, target: str) -> Iterator[str]:
        """Yield a name to write to; on a disk it is renamed at the end. Object stores show only complete objects."""
        self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
        if not self._is_local:
            yield target
            return
        partial, destination = f"{target}.{uuid4().hex}.partial", Path(target)
        try:
            yield partial
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        with suppress(FileNotFoundError):  # another writer has removed it, after writing the target itself
            os.replace(partial, target)
        for stray in destination.parent.glob(
            f"{glob.escape(destination.name)}.*.partial"
        ):  # of writers that were killed
            stray.unlink(missing_ok=True)

    def _path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))


def share(storage: Storage, path: Path) -> str:
    """Copy an input (a model directory or a file) to a storage unless it is there; return its name there."""
    name = input_name(path)
    storage.publish(path, name, _COMPLETE)
    return name


def fetch_input(storage: Storage, name: str, directory: Path) -> Path:
    """Copy a shared input into ``directory``; return the path of the model directory, or of the file."""
    target = directory / name
    if not target.is_dir():
        storage.fetch(name, target, _COMPLETE)
    (target / _COMPLETE).unlink(missing_ok=True)  # also if a killed worker has fetched it
    inside = sorted(target.iterdir())
    is_file = len(inside) == 1 and name.endswith(".file")
    return inside[0] if is_file else target


def input_name(path: Path) -> str:
    """Return the name under which an input is stored; it changes with any of its files."""
    digest = hashlib.sha256(str(path.absolute()).encode())
    for file in _files(path):
        status = file.stat()
        digest.update(f"\0{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return f"{INPUTS}/{digest.hexdigest()[:24]}{'.file' if path.is_file() else ''}"


def _files(source: Path) -> Iterator[Path]:
    """Yield the files of a directory, or the file itself."""
    yield from sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
