"""Publishes a finished output on the Hugging Face hub, in one commit, without paths of this machine."""

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError, first_line
from emloc_core.files.card import CARD, HUB_ID
from emloc_core.files.documents import read_object
from emloc_core.files.lora import CONFIG
from emloc_core.files.manifest import MANIFEST, read_manifest
from emloc_core.files.own import require_own_files

_WRITTEN = (".json", ".jsonl", ".safetensors")  # what readers of an output take for a part of it
_PATIENCE = 600.0  # seconds without a byte, after which an upload is given up; the library waits forever


def check_repository(repository: str) -> None:
    """Refuse what is not ``organisation/name``, the id of a repository, before a stage runs for hours."""
    if not HUB_ID.fullmatch(repository):
        raise EmlocError(f"{repository} is not the id of a repository.", "Give organisation/name.")


def push(
    directory: str | PathLike[str],
    repository: str,
    *,
    private: bool = True,
    with_rows: bool = False,
    base: str | None = None,
) -> str:
    """Upload an output, and return the address of the commit: see :func:`emloc_core.push`.

    Paths of this machine in its manifest and its adapter's config become their last parts. Weights, configs and rows of
    an earlier output there that this one lacks are removed.
    """
    directory = Path(directory)
    files, kind = to_publish(directory, repository, with_rows=with_rows, base=base)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session

    api, session = HfApi(), get_session()
    before, session.timeout = session.timeout, _PATIENCE
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        published = api.list_repo_files(repository)
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        old = [name for name in published if MANIFEST in published and name not in files and name.endswith(_WRITTEN)]
        operations += map(CommitOperationDelete, old)
        commit = api.create_commit(repository, operations, commit_message=f"Upload {kind} made by EMLoC")
    except Exception as error:  # of the hub, or whatever the HTTP library of this version of huggingface_hub raises
        raise EmlocError(
            f"{directory} cannot be pushed to {repository} ({first_line(error)}).",
            "Check the connection, log in with `hf auth login` and a token that may write there, and run `emloc push` "
            "again.",
            code="unavailable",
            resumable=True,
        ) from error
    finally:
        session.timeout = before
    return str(commit.commit_url)


def to_publish(
    directory: Path, repository: str, *, with_rows: bool = False, base: str | None = None
) -> tuple[dict[str, Path | bytes], str]:
    """Return what an upload would publish, by name: a file, or its content without paths; and the kind of output.

    Raises:
        EmlocError: see :func:`emloc_core.push`. The hub is not asked.
    """
    check_repository(repository)
    manifest = read_manifest(directory)
    if manifest is None:
        raise EmlocError(
            f"{directory} is not a finished output of emloc.", "Give the directory of one.", code="missing"
        )
    require_own_files(directory, ["*"])
    own = dict(_own_files(directory))
    rows = [name for name, path in own.items() if path.suffix == ".jsonl" and path.stat().st_size]
    if rows and not with_rows:
        raise EmlocError(
            f"{directory} holds rows of your data ({', '.join(rows)}), which would be published.",
            "Give --with-rows (in Python with_rows=True) if they may be; an adapter and a merged model hold none.",
            code="refused",
        )
    changed = {name: text.encode() for name, text in _without_paths(directory, manifest, base)}
    return {name: changed.get(name, path) for name, path in own.items()}, manifest["kind"]


def _own_files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield the names and paths of an output's files, without those of other outputs that are in its directory."""
    others = {path.parent for path in directory.rglob(MANIFEST)} - {directory}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and not name.startswith(".") and others.isdisjoint(path.parents):
            yield name, path


def _without_paths(directory: Path, manifest: dict[str, Any], base: str | None) -> Iterator[tuple[str, str]]:
    """Yield the names and contents of files that name paths of this machine, with only the paths' last parts."""
    inputs = manifest.get("inputs") or {}
    names = {path: Path(path).name for path in inputs.values() if isinstance(path, str) and Path(path).is_absolute()}
    local = next((inputs[role] for role in ("base", "model") if role in inputs), None)
    if base is not None:
        check_repository(base)
        if local in names:
            names[local] = base
    result = manifest.get("result") or {}
    if isinstance(name := result.get("base"), str):  # an emulator's; an evaluation has scores there
        manifest = {**manifest, "result": {**result, "base": names.get(name, name)}}
    manifest = {**manifest, "inputs": {role: names.get(path, path) for role, path in inputs.items()}}
    yield MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    if (directory / CONFIG).is_file():
        config = read_object(directory / CONFIG)
        base_name = str(config.get("base_model_name_or_path"))
        if Path(base_name).is_absolute():
            config["base_model_name_or_path"] = base or Path(base_name).name
        yield CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n"
    if base is not None and (directory / CARD).is_file():
        text = (directory / CARD).read_text(encoding="utf-8")
        for path, name in names.items():
            if name == base:
                text = text.replace(f'"{Path(path).name}"', f'"{base}"').replace(f"`{Path(path).name}`", f"`{base}`")
        yield CARD, text.replace("---\n", f"---\nbase_model: {base}\n", 1)
