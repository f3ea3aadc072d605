"""Careful reading of manifests: anyone may have written them, or changed what they describe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from emloc_core.errors import EmlocError
from emloc_core.files.output import MANIFEST

#: In the result of a manifest: the SHA-256 over what was written, as its reader computes it.
CONTENT = "sha256"


def manifest_value(manifest: Mapping[str, Any], directory: Path, name: str, kind: Any) -> Any:
    """Return a part of a manifest.

    Args:
        manifest: the content of ``emloc.json``.
        directory: the directory that it was read from, for the message.
        name: dotted name of the part: ``request.settings``.
        kind: its type, a JSON type: ``str``, ``list[str]``, ``int | None``.

    Raises:
        EmlocError: it is missing, or of another type.
    """
    found: Any = manifest
    for key in name.split("."):
        if not isinstance(found, Mapping) or key not in found:
            raise EmlocError(f"{directory / MANIFEST} has no {name}.", "Make the directory again.", code="damaged")
        found = found[key]
    try:
        return TypeAdapter(kind).validate_python(found, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise EmlocError(
            f"{directory / MANIFEST} has an invalid {name}: {problem}.", "Make the directory again.", code="damaged"
        ) from None


def require_unchanged(manifest: Mapping[str, Any], directory: Path, content: str) -> None:
    """Refuse a directory that has changed since its manifest was written.

    Args:
        manifest: the content of its ``emloc.json``.
        directory: the directory.
        content: the SHA-256 over its current content.

    Raises:
        EmlocError: the manifest has another hash, or none.
    """
    if manifest_value(manifest, directory, f"result.{CONTENT}", str) != content:
        raise EmlocError(
            f"{directory} has changed since it was made: its files are not those that its {MANIFEST} was written for.",
            "Copy or make the directory again.",
            code="damaged",
        )
