"""Looks at a tiny model of a config, checks the findings as the conformance kit does, and keeps them in the cache."""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from emloc_core.compat.model_types import has_model_type
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.memory.cache import Cache, key
from emloc_core.observed.record import KNOWN, digest, from_record, to_record
from emloc_core.units import human_seconds

if TYPE_CHECKING:
    from emloc_core.scaffold.draft import Draft

_LOGGER = logging.getLogger("emloc.families")
#: The code that decides what is seen, and whether it is accepted.
_CODE = ("observed", "scaffold", "conformance", "emulator", "model", "adapters", "standins", "family.py")


def family_of(content: Mapping[str, Any]) -> Family | None:
    """Return the declaration of one config: as an output has it, from the cache, or by looking at a tiny model of it.

    None if transformers has no such model type.

    Args:
        content: of a ``config.json``.

    Raises:
        EmlocError: a person has to look at the model; says why, and which command drafts a plugin.
        OSError, MemoryError, RuntimeError: the disk or the memory is full.
    """
    name = digest(content)
    if name not in KNOWN:
        if not has_model_type(content["model_type"]):
            return None
        KNOWN[name] = _declaration(content, Cache(f"{key(name, code=_CODE)}-declaration"))
    return KNOWN[name]


def _declaration(content: Mapping[str, Any], cache: Cache) -> Family:
    with suppress(TypeError, ValueError, KeyError, AttributeError):
        return from_record(cache.values)
    began = time.perf_counter()
    record = recorded(observed(content), content)
    took = human_seconds(time.perf_counter() - began)
    _LOGGER.warning("No plugin declares %r; observed: %s, %s.", content["model_type"], record["found"], took)
    cache.add(record)
    return from_record(record)


def observed(content: Mapping[str, Any]) -> "Draft":
    """Return the draft of one config, which has passed the checks.

    Args:
        content: of a ``config.json``.

    Raises:
        EmlocError, OSError, MemoryError, RuntimeError: as :func:`family_of`.
    """
    draft = _draft(content)
    _require_checks(draft)
    return draft


def recorded(draft: "Draft", content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a draft."""
    return to_record(draft.family, content, _summary(draft))


def _draft(content: Mapping[str, Any]) -> "Draft":
    from emloc_core.scaffold.scaffold import scaffold

    with TemporaryDirectory(prefix="emloc-observed-") as directory:
        file = Path(directory) / "config.json"
        plain = {name: value for name, value in content.items() if name != "quantization_config"}
        file.write_text(json.dumps(plain), encoding="utf-8")
        try:
            draft = scaffold(file, alone=True)
        except EmlocError as error:
            reason = str(error.args[0]).replace(str(file), "its config.json")
            raise EmlocError(_cannot(content, reason), error.fix, code=error.code) from error
    if doubts := [note.removeprefix("Edit: ") for note in draft.notes if note.startswith("Edit: ")]:
        raise _needs_a_plugin(content, doubts[0])
    return draft


def _require_checks(draft: "Draft") -> None:
    from emloc_core.conformance.checks import EACH
    from emloc_core.conformance.tiny import TinyModel

    (tiny,) = draft.family.tiny_configs
    with TemporaryDirectory(prefix="emloc-observed-") as directory:
        family = replace(draft.family, modality="text") if draft.text_only else draft.family
        subject = TinyModel(family, tiny, "tiny", Path(directory) / "tiny")
        for check in EACH:
            result = check.on(subject)
            if not result.passed:
                reason = f"on a tiny model, the check {result.check!r} fails: {result.message}"
                cause = subject.raised[result.check]
                if isinstance(cause, EmlocError) and cause.code == "unsupported":
                    raise EmlocError(_cannot(tiny, reason), cause.fix, code=cause.code) from cause
                raise _needs_a_plugin(tiny, reason) from cause


def _cannot(content: Mapping[str, Any], reason: str) -> str:
    return f"No plugin declares the model type {content['model_type']!r}, and looking at it is not enough: {reason}"


def _needs_a_plugin(content: Mapping[str, Any], reason: str) -> EmlocError:
    from emloc_core.scaffold.package import name_for

    name = name_for(content["model_type"])
    return EmlocError(
        _cannot(content, reason),
        f"`emloc families new {name} --from MODEL` drafts a plugin, and says in it what to edit (docs/plugins.md).",
        code="plugin",
    )


def _summary(draft: "Draft") -> str:
    """Return a summary of a draft: ``7 Linears in 4 input groups per block``, for every tower."""
    family, parts = draft.family, []
    for tower in family.towers:
        linears = sum(map(len, tower.input_groups))
        where = "per block" if len(family.towers) == 1 else f"per block of {tower.blocks}"
        parts.append(f"{linears} Linears in {len(tower.input_groups)} input groups {where}")
    suffix = " on text alone, since no image could be made up from the config" if draft.text_only else ""
    return f"{'; '.join(parts)}, all checks passed{suffix}"
