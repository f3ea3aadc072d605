"""Keeps what is known of models between runs: their outlines, and what was traced of their steps.

It is kept in the user's cache directory, in one file for the outline and one for the traces of each model, by a digest
of the model's config and family, of the versions of the packages that are traced, and of this package's own code. A
file that cannot be read or written is ignored. ``EMLOC_CACHE`` names another directory; if empty, nothing is kept.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_object, write_json
from emloc_core.files.output import versions

VARIABLE = "EMLOC_CACHE"
#: Files that are kept; the oldest go first.
_MOST = 256
#: The code that decides what is traced.
_CODE = ("memory", "model", "standins", "algorithms", "compat", "tuning", "tokens.py", "objective.py")


class Cache:
    """A file of JSON values by name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.values: dict[str, Any] = {}
        if path := _file(name):
            with suppress(EmlocError):
                self.values = read_object(path)

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep values beside those that this or another process kept."""
        self.values.update(values)
        path = _file(self._name)
        if path is None:
            return
        with suppress(EmlocError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(EmlocError):
                self.values = {**read_object(path), **self.values}
            write_json(path, self.values)
            _prune(path.parent)


def directory() -> Path | None:
    """Return where files are kept; None if nothing is to be."""
    configured = os.environ.get(VARIABLE)
    if configured is not None:
        return Path(configured) if configured else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "emloc"
    except RuntimeError:  # no home
        return None


def key(*parts: Any, code: Sequence[str] = _CODE) -> str:
    """Return a digest of values, of the versions of packages, and of the code that decides what is kept.

    Args:
        parts: the values; equal ones have the same text, and others have another.
    """
    text = json.dumps([versions(), _code(tuple(code)), *parts], sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _plain(value: Any) -> Any:
    """Return a value's parts as JSON values, or its text without addresses, the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return vars(value) if is_dataclass(value) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _file(name: str) -> Path | None:
    parent = directory()
    return parent and parent / f"{name}.json"


def _prune(directory: Path) -> None:
    files = sorted(directory.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[:-_MOST]:
        path.unlink()


@cache
def _code(parts: tuple[str, ...]) -> str:
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for part in parts:
        source = root / part
        for path in sorted(source.glob("*.py")) if source.is_dir() else [source]:
            total.update(path.read_bytes())
    return total.hexdigest()
