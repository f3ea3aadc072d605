"""What a manifest says, read with care: anyone may have written it, or changed what it describes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from emloc_core.errors import EmlocError
from emloc_core.files.output import MANIFEST

#: In the result of a manifest: the SHA-256 over the weights that were written, as their reader computes it.
CONTENT = "sha256"


def manifest_value(manifest: Mapping[str, Any], directory: Path, name: str, kind: Any) -> Any:
    """Return a part of a manifest.

    Args:
        manifest: the content of ``emloc.json``.
        directory: where it was read, for the message.
        name: of the part, by dots: ``request.settings``.
        kind: its type, of JSON's: ``str``, ``list[str]``, ``int | None``.

    Raises:
        EmlocError: it is not there, or is something else.
    """
    found: Any = manifest
    for key in name.split("."):
        if not isinstance(found, Mapping) or key not in found:
            raise EmlocError(f"{directory / MANIFEST} has no {name}.", "Make the directory again.")
        found = found[key]
    try:
        return TypeAdapter(kind).validate_python(found, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise EmlocError(f"{directory / MANIFEST} has an odd {name}: {problem}.", "Make the directory again.") from None


def require_unchanged(manifest: Mapping[str, Any], directory: Path, content: str) -> None:
    """Refuse a directory whose weights are not those that its manifest was written for.

    Args:
        manifest: the content of its ``emloc.json``.
        directory: what is read.
        content: the SHA-256 over what is there now.

    Raises:
        EmlocError: another hash was written, or none.
    """
    if manifest_value(manifest, directory, f"result.{CONTENT}", str) != content:
        raise EmlocError(
            f"{directory} is not as it was made: its files are not those that its {MANIFEST} was written for.",
            "Copy or make the directory again.",
        )
