"""The manifests of outputs, read with care: anyone may have written them, or changed the files that they describe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_object

MANIFEST = "emloc.json"
#: In the result of a manifest: the SHA-256 over what was written, as its reader computes it.
CONTENT = "sha256"
#: The most stages that an adapter's history is followed back.
_STAGES = 8


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a directory that EMLoC wrote, or None for any other directory.

    Raises:
        EmlocError: it is damaged: not an object, or its kind, request or result has the wrong type.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    manifest = read_object(path)
    for name, kind in (("kind", str), ("request", dict), ("result", dict)):
        if not isinstance(manifest.get(name, kind()), kind):
            type_name = type(manifest[name]).__name__
            raise EmlocError(f"{path} is damaged: its {name} is a {type_name}.", "Restore the file.", code="damaged")
    return manifest


def input_name(directory: Path, role: str) -> str:
    """Return the path or hub id of an input that a finished directory was made from.

    Args:
        role: ``base``, ``model``, ``emulator`` or ``adapter``.

    Raises:
        EmlocError: its manifest does not name it.
    """
    inputs = (read_manifest(directory) or {}).get("inputs", {})
    if not isinstance(inputs, dict) or not isinstance(inputs.get(role), str):
        raise EmlocError(
            f"{directory} does not say what its {role} is.", f"Give the {role} with --{role}.", code="missing"
        )
    return inputs[role]


def learned_preferences(adapter: Path) -> bool:
    """Return whether a LoRA was trained by preferences, by its manifest, or by those of its inputs."""
    for _ in range(_STAGES):
        manifest = read_manifest(adapter) or {}
        inputs, request = (manifest.get(name) for name in ("inputs", "request"))
        before = inputs.get("adapter") if isinstance(inputs, dict) else None
        if not isinstance(before, str):
            settings = request.get("settings") if isinstance(request, dict) else None
            return isinstance(settings, dict) and settings.get("objective", "sft") != "sft"
        adapter = Path(before)
    return False


def parents(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the manifests of the inputs that are outputs, and of their inputs in turn, the oldest first."""
    manifests: dict[Path, dict[str, Any]] = {}

    def add(inputs: Any) -> None:
        for role in ("emulator", "model", "adapter"):
            directory = Path(inputs.get(role, "")).resolve()
            if role not in inputs or directory in manifests or not (manifest := read_manifest(directory)):
                continue
            manifests[directory] = manifest  # first, in case it names itself
            add(manifest["inputs"])
            manifests[directory] = manifests.pop(directory)  # its own parents come first

    add(inputs)
    return list(manifests.values())


def manifest_value(manifest: Mapping[str, Any], directory: Path, name: str, kind: Any) -> Any:
    """Return a part of a manifest.

    Args:
        directory: the directory that it was read from, for the message.
        name: dotted name of the part: ``request.settings``.
        kind: its type, a JSON type: ``str``, ``list[str]``, ``int | None``.

    Raises:
        EmlocError: it is missing, or of another type.
    """
    value: Any = manifest
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise EmlocError(f"{directory / MANIFEST} has no {name}.", "Make the directory again.", code="damaged")
        value = value[key]
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise EmlocError(
            f"{directory / MANIFEST} has an invalid {name}: {problem}.", "Make the directory again.", code="damaged"
        ) from None


def require_unchanged(manifest: Mapping[str, Any], directory: Path, content: str) -> None:
    """Refuse a directory that has changed since its manifest was written.

    Args:
        content: the SHA-256 over its current content.
    """
    if manifest_value(manifest, directory, f"result.{CONTENT}", str) != content:
        raise EmlocError(
            f"{directory} has changed since it was made: its files are not those that its {MANIFEST} was written for.",
            "Copy or make the directory again.",
            code="damaged",
        )
