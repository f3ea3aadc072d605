"""Refuses a request for its words and the files that it names, before torch is imported, which takes seconds.

The stage itself would refuse the same later, in the same words. Anything that must be downloaded is left to it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emloc_core.data.mixture import weights
from emloc_core.data.sources import reader_of
from emloc_core.files.checkpoint import open_checkpoint, require_name
from emloc_core.files.lora import require_lora
from emloc_core.files.manifest import read_manifest
from emloc_core.files.output import output_manifest
from emloc_core.observed.record import recall
from emloc_core.plugins.manager import plugin_manager
from emloc_core.requests import Request
from emloc_core.settings import AUTO, FREE
from emloc_core.stages.rows import held_out_share
from emloc_core.units import parse_bytes

#: Fields that may name an output of an earlier stage.
_INPUTS = ("model", "base", "adapter", "emulator", "source")
#: Settings that name an algorithm, and the hook that offers it.
_NAMED = {"kind": "emulators", "correction": "corrections"}


def precheck(request: Request) -> None:
    """Refuse a request whose models, rows, algorithms, memory or place for the output cannot be what it says."""
    fields: Any = request
    if (memory := getattr(fields, "memory", None)) not in (None, FREE):
        parse_bytes(memory)
    check_names(getattr(fields, "settings", None))
    systems = list(getattr(fields, "systems", ()))
    for owner in (fields, *systems):
        for path in filter(None, (getattr(owner, field, None) for field in _INPUTS)):
            recall(read_manifest(Path(path)))
    output_manifest(request.output)
    if adapter := getattr(fields, "adapter", None):
        require_lora(adapter)
    if source := getattr(fields, "source", None):
        check_exists(source)
    for rows in (getattr(fields, "data", None), getattr(fields, "selection_data", None)):
        check_rows(rows)
    if evaluation := getattr(fields, "evaluation", None):
        held_out_share(evaluation, fields.data)
    for name in filter(
        None, (*(getattr(fields, field, None) for field in ("model", "base")), *(owner.model for owner in systems))
    ):
        check_model(name)  # last: a model that no plugin declares is looked at


def check_names(settings: Any) -> None:
    """Refuse settings that name an algorithm that nothing offers."""
    for field, hook in _NAMED.items():
        name = getattr(settings, field, None)
        if name is not None and name != AUTO:
            plugin_manager().require(hook, name)


def check_model(name: str) -> None:
    """Refuse a model that does not exist, or that no family declares.

    Args:
        name: directory or hub id; nothing is downloaded.
    """
    check_exists(name)
    if Path(name).exists():
        plugin_manager().family_for(open_checkpoint(name).config)


def check_exists(name: str) -> None:
    """Refuse a path that does not exist and is no hub id."""
    if not Path(name).exists():
        require_name(name)


def check_rows(data: Any) -> None:
    """Refuse rows of files that do not exist.

    Args:
        data: see :func:`emloc_core.data.rows.load_rows`; of hub datasets nothing is downloaded.
    """
    sources: Iterable[Any] = weights(data) or [data]
    for source in sources:
        if isinstance(source, str | Path):
            reader_of(str(source))  # which reads nothing yet
