"""Text, JSON and TOML in files: written whole or not at all, read with clear errors."""

import json
import os
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.files.lock import is_at, locked
from emloc_core.files.own import require_regular


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically: readers see the old file or the new one, even after a crash.

    Several processes may write the same file: the last one wins.
    """
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.tmp")
    with locked(temporary, wait=True) as file:
        try:
            file.truncate(0)  # a killed writer may have left a partial file
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if is_at(file, temporary):
                temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file that the user asked for, whole or not at all; its directory is created if needed.

    Raises:
        EmlocError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):  # the directory may not exist
            partial.unlink()
        raise EmlocError(f"{path} cannot be written ({error.strerror}).", "Choose another place with -o.") from error


def _refuse(constant: str) -> Any:
    """Refuse NaN and infinities, which Python reads but JSON does not have; they could not be written back."""
    raise ValueError(f"{constant} is not a number in JSON")


def read_json(path: Path, constant: Callable[[str], Any] = _refuse) -> Any:
    """Read a JSON file.

    Args:
        constant: returns the value for NaN and infinities, by their name.

    Raises:
        EmlocError: the file is missing or is not JSON.
    """
    try:
        require_regular(path)
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
    except FileNotFoundError:
        raise EmlocError(f"{path} does not exist.", "Check the path.", code="missing") from None
    except OSError as error:
        raise EmlocError(
            f"{path} cannot be read ({error.strerror}).", "Check its permissions, or restore it.", code="unavailable"
        ) from None
    except (ValueError, RecursionError) as error:
        raise EmlocError(
            f"{path} is not valid JSON ({error}).", "Restore the file, or make it again.", code="damaged"
        ) from None


def read_object(path: Path, constant: Callable[[str], Any] = _refuse) -> dict[str, Any]:
    """Read a JSON file that holds an object, as indexes and manifests do.

    Raises:
        EmlocError: the file is missing, is not JSON, or holds something else.
    """
    content = read_json(path, constant)
    if not isinstance(content, dict):
        raise EmlocError(
            f"{path} holds a {type(content).__name__}, not an object.", "Restore the file.", code="damaged"
        )
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's ``config.json``. NaN and infinities, in older ones, are returned as transformers writes them.

    Raises:
        EmlocError: as :func:`read_object`.
    """
    return read_object(path, lambda constant: {"__float__": constant})


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """Read a TOML file; messages call it ``kind`` (``recipe``, say).

    Raises:
        EmlocError: the file is missing, cannot be read, or is not TOML.
    """
    try:
        require_regular(path)
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write the mark
    except FileNotFoundError:
        raise EmlocError(f"There is no {kind} at {path}.", "Check the path.", code="missing") from None
    except OSError as error:
        raise EmlocError(
            f"{path} cannot be read ({error.strerror}).", "Give a TOML file.", code="unavailable"
        ) from None
    except (ValueError, RecursionError) as error:
        raise EmlocError(f"{path} is not valid TOML: {error}.", "Fix that line.") from None
