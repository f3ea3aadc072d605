"""Output directories that are complete or absent.

A stage builds its directory in a :class:`~emloc_core.files.workspace.Workspace` beside the final path and renames it
when it is complete, so that everything that looks finished is. ``emloc.json`` in every finished directory records what
made it and from what (the *request*), the versions, and the result; it depends on the inputs alone. What varies from
run to run (seconds, peak memory) is in ``timing.json``.
"""

import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.errors import DISK_FULL, DiskFullError, EmlocError
from emloc_core.files.card import CARD, card
from emloc_core.files.documents import read_object, write_json
from emloc_core.files.manifest import MANIFEST, parents, read_manifest
from emloc_core.files.meter import Meter
from emloc_core.files.workspace import Workspace, remove_at_once
from emloc_core.observed.record import DECLARATIONS
from emloc_core.plugins.manager import GROUP, plugin_manager

if TYPE_CHECKING:
    from emloc_core.family import Family
    from emloc_core.files.inputs import Inputs

TIMING = "timing.json"
#: Hashes of large files by path and stamp; see :class:`emloc_core.files.inputs.Inputs`.
HASHES = ".emloc-hashes.json"
_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_ELSEWHERE = "Choose another output directory, or remove this one."
_NO_ROOM = 256 << 10  # bytes; with less free, a failure is attributed to the full disk


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python, of the packages that affect an output, and of all packages with plugins."""
    versions = {"python": platform.python_version()}
    for package in ("emloc", "torch", "transformers", "peft", "trl", "safetensors", "bitsandbytes", "diffusers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions | {entry.dist.name: entry.dist.version for entry in entry_points(group=GROUP) if entry.dist}


def require_directory(path: Path) -> None:
    """Refuse a path that cannot be a directory, since there is a file in its place or on the way to it."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise EmlocError(f"{existing} is not a directory.", "Choose another output directory.", code="exists")


def output_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest of the output at a path; None if there is nothing, or an empty directory.

    Raises:
        EmlocError: something else is at that path.
    """
    if path.is_symlink() and not (path / MANIFEST).exists():
        raise EmlocError(f"{path} is a link, which a directory cannot replace.", _ELSEWHERE, code="exists")
    require_directory(path)
    if not path.exists() or not any(path.iterdir()):
        return None
    manifest = read_manifest(path)
    if manifest is None:
        raise EmlocError(f"{path} exists and was not written by emloc.", _ELSEWHERE, code="exists")
    return manifest


class Output:
    """A directory that one stage makes.

    Args:
        kind: ``emulator``, ``adapter``, ``corrected-adapter``, ``checkpoint``, ``evaluation``.
        request: everything that determines the content: settings, and fingerprints of the inputs. JSON values only.
        device: the kind of device that computes it: a run does not resume on another kind.
        inputs: role, such as ``base`` -> path or hub id of that input. Not part of the request: an input that has moved
            is the same input.
        files: the files that are read to make it, as they were when hashed for the request.
        family: the base's: its class is named on the card, and what was observed of it goes into the manifest.

    Use :meth:`is_finished` first, then :meth:`build`.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        request: dict[str, Any],
        device: str = "cpu",
        inputs: Mapping[str, str] | None = None,
        files: "Inputs | None" = None,
        family: "Family | None" = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.name or self.path.name == "..":
            raise EmlocError(f"{path} is not a name for a new directory.", "Give one, such as ./emulator.")
        self.kind = kind
        self.request = json.loads(json.dumps(request))
        self._inputs = dict(inputs or {})
        self._files = files
        self._loader = family.auto_class if family else "AutoModelForCausalLM"
        self._objective = plugin_manager().objective_of(family) if family else None
        self._declarations = [dict(record) for record in family.observed] if family else []
        self._versions = {**versions(), "device": device}
        self._workspace = Workspace(self.path)
        self.staging = self._workspace.content
        #: A sentence in Markdown for cards: what the stage did. It holds no paths, since cards are published.
        self.provenance = ""
        self.result: dict[str, Any] = {}
        self.timing: dict[str, Any] = {}

    def is_finished(self) -> bool:
        """Return whether the directory already exists, made by the same request.

        Raises:
            EmlocError: something else is at that path.
        """
        if self._is_there():
            self._workspace.sweep()
            return True
        return False

    def _is_there(self) -> bool:
        manifest = output_manifest(self.path)
        if manifest is None:
            return False
        if manifest.get("kind") != self.kind:
            raise EmlocError(
                f"{self.path} exists and holds {manifest.get('kind')!r}, not {self.kind!r}.", _ELSEWHERE, code="exists"
            )
        require_same(self.path, manifest.get("request", {}), self.request)
        return True

    def note(self, name: str, value: Any) -> None:
        """Record in the finished directory's manifest something that is no part of its content."""
        manifest = read_object(self.path / MANIFEST)
        if manifest["result"].get(name) != value:
            write_json(self.path / MANIFEST, {**manifest, "result": {**manifest["result"], name: value}})

    @contextmanager
    def build(self) -> Iterator[Path]:
        """Yield the staging directory, and publish it when the block ends without an exception.

        The content that an interrupted run left is kept if it came from the same request and versions: after a kill, a
        full disk or a resumable error, the same command resumes. Other errors remove it. Names that start with a dot
        are for work in progress: they are removed before the directory is published.

        Raises:
            EmlocError: an interrupted run of another request is at that path, another process is writing there, or
                the disk is full.
        """
        meter = Meter()
        with _refuse_full_disk(self.path), self._entered():
            try:
                with self._naming_changed_inputs():
                    yield self.staging
                self.timing.update(meter.read())
                self._publish()
            except EmlocError as error:
                if not (error.resumable and self._workspace.is_started):
                    self._workspace.discard()
                raise

    @contextmanager
    def _naming_changed_inputs(self) -> Iterator[None]:
        """Name an input that changed or disappeared meanwhile: libraries raise their own errors for one."""
        try:
            yield
        except EmlocError:
            raise
        except Exception:
            if self._files:
                self._files.verify()
            raise

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Lock the workspace for this request."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._workspace.hold())
                self._start_or_resume()
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise
                raise EmlocError(
                    f"{self.path} cannot be created ({error.strerror}).", "Choose another path.", code="unavailable"
                ) from error
            yield

    def _start_or_resume(self) -> None:
        workspace = self._workspace
        request = {"request": self.request, "versions": self._versions}
        stamps = self._files.stamps if self._files else []
        try:
            if self._is_there():
                workspace.discard()
                raise EmlocError(f"Another process has just finished {self.path}.", "Use that output.", code="exists")
            if workspace.is_started and workspace.request.exists():
                saved = read_object(workspace.request)
                files = saved.pop("inputs", None)
                if differing := differences(saved, request):
                    raise EmlocError(
                        f"{workspace.directory} holds an interrupted run of something else: {differing}.",
                        "Run that command again to finish it, or remove the directory.",
                        code="exists",
                    )
                if files != stamps:  # the same content now, but it may have changed in between
                    workspace.clear()
            else:  # it was being removed
                workspace.clear()
        except EmlocError:
            if not workspace.is_started:
                workspace.discard()
            raise
        write_json(workspace.request, {**request, "inputs": stamps})
        self.staging.mkdir(exist_ok=True)

    def _publish(self) -> None:
        """Sync the content to disk, rename it in one step, and only then discard the workspace with its request."""
        if self._files:
            self._files.verify()
        manifest = {
            "kind": self.kind,
            "inputs": self._inputs,
            "request": self.request,
            "result": self.result,
            "made": self.provenance,
            "versions": self._versions,
        }
        manifest |= {DECLARATIONS: self._declarations} if self._declarations else {}
        self._write_card(manifest)
        write_json(self.staging / MANIFEST, manifest)
        write_json(self.staging / TIMING, self.timing)
        for path in self.staging.rglob("*"):
            if not any(part.startswith(".") for part in path.relative_to(self.staging).parts):
                _fsync(path)
        for path in list(self.staging.rglob(".*")):  # last, so that a run killed before this repeats no work
            _remove(path)
        _fsync(self.staging)
        try:
            os.rename(self.staging, self.path)  # an empty directory may be in that place
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
            raise EmlocError(
                f"{self.path} was created by something else during the run.",
                "Move it elsewhere, and run the same command again.",
                code="exists",
                resumable=True,
            ) from None
        _fsync(self.path.parent)
        self._workspace.discard()

    def _write_card(self, manifest: dict[str, Any]) -> None:
        table = self.staging / "table.md"
        scores = table.read_text(encoding="utf-8") if table.is_file() else None
        try:
            text = card(manifest, parents(self._inputs), self._loader, scores, self._objective)
        except (EmlocError, OSError, LookupError, AttributeError, TypeError, ValueError):
            text = card(manifest, [], self._loader, scores, self._objective)  # manifests from others may hold anything
        (self.staging / CARD).write_text(text, encoding="utf-8")


@contextmanager
def _refuse_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except EmlocError:
        raise
    except Exception as error:
        free = shutil.disk_usage(path.parent).free
        # Libraries that write files raise their own errors when the disk is full.
        if getattr(error, "errno", None) not in DISK_FULL and free > _NO_ROOM:
            raise
        raise DiskFullError(
            f"The disk is full: writing to {path} failed with {free:,} bytes free.",
            "Free some space and run the same command again: it resumes where it stopped.",
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        remove_at_once(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


#: Names of inputs that a request holds only hashes of.
_ROLES = {
    "rows": "the rows",
    "calibration": "the calibration rows",
    "selection": "the selection rows",
    "tokenized_rows": "what the tokenizer makes of the rows",
    "base": "the base",
    "linears": "what the family's plugin declares",
    "native": "what the layout's plugin makes of it",
    "model": "the model",
    "adapter": "the adapter",
    "emulator": "the emulator",
    "source": "the source",
}


def require_same(path: Path, old: Any, new: Any) -> None:
    """Refuse an output that another request made, or other settings."""
    if differing := differences(old, new):
        raise EmlocError(f"{path} exists and was made from something else: {differing}.", _ELSEWHERE, code="exists")


def differences(old: Any, new: Any, path: str = "") -> str:
    """Name the settings in which two requests, JSON values, differ, with both values; "" if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        texts = (
            differences(old.get(key), new.get(key), f"{path}.{key}" if path else key) for key in sorted({*old, *new})
        )
        return "; ".join(text for text in texts if text)
    if old == new:
        return ""
    if isinstance(new, list) or _is_hash(old) or _is_hash(new):  # their values help nobody
        return f"{_ROLES.get(path.removeprefix('request.'), path)} changed"
    return f"{path} was {_short(old)} and is now {_short(new)}"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
