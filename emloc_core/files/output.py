"""Output directories that are whole or absent.

A stage builds its directory beside its place (``.NAME.partial``) and renames it when it is complete, so nothing that
looks finished ever is not. ``emloc.json`` in every finished directory says what made it and from what (the
*request*), with which versions, and with what result; it is a function of the inputs alone. What varies from run to
run (seconds, peak memory) is in ``timing.json``.
"""

import errno
import fcntl
import json
import os
import platform
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from emloc_core.errors import DiskFullError, EmlocError
from emloc_core.files.meter import Meter

MANIFEST = "emloc.json"
TIMING = "timing.json"
#: Hashes of large files by path, size and time of change; see :func:`emloc_core.files.checkpoint.hash_files`.
HASHES = ".emloc-hashes.json"
_REQUEST = "request.json"
_LOCK = ".lock"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ROOM = 256 << 10  # bytes; with less, a failure is put down to the full disk


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape an output."""
    found = {"python": platform.python_version()}
    for package in ("emloc", "torch", "transformers", "peft", "trl", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        EmlocError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise EmlocError(f"{path} does not exist.", "Check the path.") from None
    except OSError as error:
        raise EmlocError(f"{path} cannot be read ({error.strerror}).", "Restore the file.") from None
    except (ValueError, RecursionError) as error:
        raise EmlocError(f"{path} is not valid JSON ({error}).", "Restore the file, or make it again.") from None


def _refuse_constant(name: str) -> None:
    """Refuse what Python reads and JSON does not have; it could not be written back."""
    raise ValueError(f"{name} is no number")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object, as configs, indexes and manifests do.

    Raises:
        EmlocError: the file is missing, is not JSON, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise EmlocError(f"{path} holds a {type(content).__name__}, not an object.", "Restore the file.")
    return content


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: of the file.
        what: the file is, for the message: ``recipe``.

    Raises:
        EmlocError: the file is missing, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EmlocError(f"There is no {what} at {path}.", "Check the path.") from None
    except OSError as error:
        raise EmlocError(f"{path} cannot be read ({error.strerror}).", "Give a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EmlocError(f"{path} is not valid TOML: {error}.", "Mend the line that it names.") from None


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a directory that EMLoC wrote, or None for any other directory.

    Raises:
        EmlocError: it is damaged: no object, or without a kind, or with a request or a result that is no object.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    manifest = read_object(path)
    for name, kind in (("kind", str), ("request", dict), ("result", dict)):
        if not isinstance(manifest.get(name, kind()), kind):
            found = type(manifest[name]).__name__
            raise EmlocError(f"{path} is damaged: its {name} is a {found}.", "Restore the file.")
    return manifest


class Output:
    """A directory that one stage makes.

    Args:
        path: where the finished directory goes.
        kind: what it holds: ``emulator``, ``adapter``, ``corrected-adapter``, ``checkpoint``, ``evaluation``.
        request: everything that determines the content: settings, and fingerprints of the inputs. JSON values only.
        device: the kind of device that computes it: results of one kind are not gone on with on another.

    Use :meth:`is_finished` first, then :meth:`build`.
    """

    def __init__(self, path: str | Path, kind: str, request: dict[str, Any], device: str = "cpu") -> None:
        self.path = Path(path)
        if not self.path.name or self.path.name == "..":
            raise EmlocError(f"{path} is no name for a new directory.", "Give one, such as ./emulator.")
        self.kind = kind
        self.request = json.loads(json.dumps(request))
        self._versions = {**versions(), "device": device}
        self.staging = self.path.with_name(f".{self.path.name}.partial")
        self.result: dict[str, Any] = {}
        self.timing: dict[str, Any] = {}

    def is_finished(self) -> bool:
        """Say whether the directory is there already, made by the same request.

        Raises:
            EmlocError: something else is at that place.
        """
        if not self.path.exists():
            return False
        remedy = "Choose another output directory, or remove this one."
        if not self.path.is_dir():
            raise EmlocError(f"{self.path} exists and is not a directory.", remedy)
        if not any(self.path.iterdir()):
            return False
        manifest = read_manifest(self.path)
        if manifest is None:
            raise EmlocError(f"{self.path} exists and was not written by emloc.", remedy)
        if manifest.get("kind") != self.kind:
            raise EmlocError(f"{self.path} exists and holds {manifest.get('kind')!r}, not {self.kind!r}.", remedy)
        differing = _differences(manifest.get("request", {}), self.request)
        if differing:
            raise EmlocError(f"{self.path} exists and was made from something else: {differing}.", remedy)
        return True

    @contextmanager
    def build(self) -> Iterator[Path]:
        """Yield the staging directory, and publish it when the block ends without an exception.

        What an interrupted run left there is kept if it was started by the same request on the same versions: after a
        kill, a full disk or a resumable error the same command goes on. A fault of the input removes it.

        Raises:
            EmlocError: an interrupted run of another request is at that place, another process is writing there, or
                the disk is full.
        """
        meter = Meter()
        with _refuse_full_disk(self.staging):
            lock = self._enter()
            try:
                yield self.staging
                self.timing.update(meter.read())
                self._publish()
            except EmlocError as error:
                started = any(path.name not in (_REQUEST, _LOCK) for path in self.staging.iterdir())
                if not (error.resumable and started):
                    shutil.rmtree(self.staging)
                raise
            finally:
                lock.close()

    def _enter(self) -> TextIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.staging.mkdir(exist_ok=True)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            raise EmlocError(f"{self.path} cannot be made ({error.strerror}).", "Choose another place.") from error
        lock = (self.staging / _LOCK).open("w", encoding="utf-8")  # held until build() ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise EmlocError(f"Another process is writing {self.path}.", "Wait for it, or stop it.") from None
        if self.is_finished():
            lock.close()
            shutil.rmtree(self.staging)
            raise EmlocError(f"{self.path} was finished by another process meanwhile.", "Use it as it is.")
        request = {"request": self.request, "versions": self._versions}
        saved = self.staging / _REQUEST
        if saved.exists():
            differing = _differences(read_json(saved), request)
            if differing:
                lock.close()
                raise EmlocError(
                    f"{self.staging} holds an interrupted run of something else: {differing}.",
                    "Run that command again to finish it, or remove the directory.",
                )
        write_json(saved, request)
        return lock

    def _publish(self) -> None:
        manifest = {"kind": self.kind, "request": self.request, "result": self.result, "versions": self._versions}
        write_json(self.staging / MANIFEST, manifest)
        write_json(self.staging / TIMING, self.timing)
        for name in (_REQUEST, _LOCK):
            (self.staging / name).unlink()
        for path in self.staging.rglob("*"):
            if path.is_file():
                _fsync(path)
        if self.path.exists():
            self.path.rmdir()  # is_finished() allowed an empty directory only
        os.rename(self.staging, self.path)
        _fsync(self.path.parent)


@contextmanager
def _refuse_full_disk(place: Path) -> Iterator[None]:
    try:
        yield
    except EmlocError:
        raise
    except Exception as error:
        free = shutil.disk_usage(place.parent).free
        # Libraries that write files raise errors of their own when the disk is full.
        if getattr(error, "errno", None) not in _DISK_FULL and free > _NO_ROOM:
            raise
        raise DiskFullError(
            f"The disk is full: writing to {place} failed with {free:,} bytes free.",
            "Free some space and run the same command again: it goes on where it stopped.",
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differences(old: Any, new: Any, at: str = "") -> str:
    """Name the settings in which two requests differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = (_differences(old.get(key), new.get(key), f"{at}.{key}" if at else key) for key in sorted({*old, *new}))
        return "; ".join(text for text in found if text)
    return "" if old == new else f"{at} was {_short(old)} and is now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
