"""The registry: models that can be planned and converted by name (:mod:`emloc_core.registry.entry`).

Entries come from the package itself, from plugins, and from the user's files. Does not import torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError, did_you_mean
from emloc_core.plugins.manager import plugin_manager
from emloc_core.registry.entry import INFERENCE, Entry, read_entry
from emloc_core.settings import CompressSettings

__all__ = ["Entry", "config_of", "find", "load_entries", "read_entry", "resolve"]

_HERE = Path(__file__).parent
#: Directory of the package's entries, in a wheel and in a checkout.
_PACKAGED = (_HERE / "entries", _HERE.parents[1] / "registry")
_GLOB = re.compile(r"[*?\[]")


def load_entries(extra: Iterable[str | Path] = ()) -> list[Entry]:
    """Return all entries sorted by id: the package's, the plugins', and those of the user's files and directories.

    A plugin with invalid entries is treated as broken.

    Raises:
        EmlocError: one of the user's files is not an entry, or two files have the same id.
    """
    entries: dict[str, Entry] = {}
    _add(entries, _read_all([next(directory for directory in _PACKAGED if directory.is_dir())]))
    manager = plugin_manager()
    for owner, paths in manager.registries():
        with manager.isolated(owner):
            _add(entries, _read_all(paths))
    _add(entries, _read_all(Path(path) for path in extra))
    return sorted(entries.values(), key=lambda entry: entry.id.lower())


def find(pattern: str, entries: Sequence[Entry] | None = None) -> list[Entry]:
    """Return the entries whose id, with or without its organisation, matches a glob. Case is ignored.

    Args:
        pattern: an id, a name, or a glob of either: ``organisation/model-7B``, ``model-*``.
        entries: entries to search; by default :func:`load_entries`.

    Raises:
        EmlocError: no entry matches.
    """
    among = load_entries() if entries is None else entries
    names = [(name, entry) for entry in among for name in (entry.id, entry.name)]
    matches = {entry.id: entry for name, entry in names if fnmatchcase(name.lower(), pattern.lower())}
    if not matches:
        verb = "matches" if _GLOB.search(pattern) else "is called"
        raise EmlocError(
            f"No entry of the registry {verb} {pattern!r}.{did_you_mean(pattern, [name for name, _ in names])}",
            "`emloc zoo list` shows them all.",
            code="missing",
        )
    return list(matches.values())


def resolve(entry: Entry, name: str = "default", overrides: Mapping[str, Any] | None = None) -> CompressSettings:
    """Return a preset's settings of stage 1. For a memory target a GPU's memory is planned, with torch.

    Args:
        overrides: settings of stage 1 that override the preset's. With a ratio nothing is planned; for a memory target
            the recommended kind is planned, or the one given here.

    Raises:
        EmlocError: there is no such preset, or no emulator's tuning fits its memory target.
    """
    preset = entry.preset(name)
    settings = CompressSettings(**{"samples": preset.samples, **(overrides or {})})
    if preset.memory is None or settings.ratio is not None:
        return settings
    from emloc_core.memory.budget import Budget
    from emloc_core.memory.decision import decide
    from emloc_core.memory.workload import make_workload

    target = None if preset.memory == INFERENCE else Budget.parse(preset.memory)
    with entry.config_file() as file:
        workload = make_workload(file, preset.train, "cuda", length=preset.length)
        way = decide(file, workload, target, settings).require_emulator()
    return settings.model_copy(update=way.emulator_settings)


@contextmanager
def config_of(model: str, *, with_tokenizer: bool = False) -> Iterator[Path]:
    """Yield the ``config.json`` of a directory, a file, an entry (by id or file), or a hub id, in that order.

    Args:
        with_tokenizer: require a tokenizer beside it, which is the model's: an entry has none.

    Raises:
        EmlocError: there is no such config.
    """
    from emloc_core.files.checkpoint import find_config

    entry = entry_of(model)
    if entry is None:
        if not (Path(model).exists() or "/" in model):
            suggestion = did_you_mean(model, [entry.name for entry in load_entries()])
            raise EmlocError(
                f"There is no model at {model}, and no entry of the registry is called that.{suggestion}",
                "Check the path, or give a hub id (organisation/name) or an entry that `emloc zoo list` shows.",
                code="missing",
            )
        yield find_config(model, with_tokenizer=with_tokenizer)
    elif with_tokenizer and entry.layout is None:
        yield find_config(entry.model, with_tokenizer=True)
    else:
        with entry.config_file() as file:
            if with_tokenizer:
                _add_native_tokenizer(entry, file.parent)
            yield file


def _add_native_tokenizer(entry: Entry, directory: Path) -> None:
    """Write the files of an entry's tokenizer and processor into a directory, as ``emloc import`` does."""
    from emloc_core.files.checkpoint import Checkpoint, find_config
    from emloc_core.model.importing import write_side_files

    source = Checkpoint(find_config(entry.model, with_tokenizer=True).parent)
    layout = plugin_manager().layout_for(source.config)
    write_side_files(source, layout.files(source.config, source.directory), directory)


def argument_of(model: str) -> tuple[str, str | None]:
    """Return the MODEL argument of the other commands for what :func:`config_of` takes.

    Returns:
        The argument, and the layout that ``emloc import`` has to rewrite first, if an entry says so.
    """
    if entry := entry_of(model):
        return entry.model, entry.layout
    return (str(Path(model).parent) if Path(model).is_file() else model), None


def entry_of(model: str) -> Entry | None:
    """Return the entry with this id, name without its organisation, or file; None for other models. Case is ignored."""
    path = Path(model)
    if path.suffix == ".toml" and path.is_file():
        return read_entry(path)
    if path.exists():
        return None
    key = model.lower()
    return next((entry for entry in load_entries() if key in (entry.id.lower(), entry.name.lower())), None)


def _read_all(paths: Iterable[Path]) -> Iterator[Entry]:
    for path in paths:
        if path.is_dir():
            yield from map(read_entry, sorted(path.glob("*.toml")))
        else:
            yield read_entry(path)


def _add(entries: dict[str, Entry], more: Iterable[Entry]) -> None:
    """Add all entries, or none. The same file twice is one entry."""
    added: dict[str, Entry] = {}
    for entry in more:
        existing = entries.get(entry.id) or added.get(entry.id)
        if existing is not None and existing.file.resolve() != entry.file.resolve():
            raise EmlocError(
                f"{existing.file} and {entry.file} are both entries of {entry.id!r}.", "Rename or remove one of them."
            )
        added[entry.id] = entry
    entries.update(added)
