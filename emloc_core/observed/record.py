"""Observed declarations: those that this process knows, and as JSON values, for outputs and for the cache.

Imports no torch.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any

from emloc_core.family import Family, Tower, require_types

#: Key of an output's ``emloc.json`` with the records that it was made with.
DECLARATIONS = "declarations"
#: Fields of a config.json that change no module. Base, emulator and merged checkpoint differ in no others.
_COSMETIC = re.compile(r"_.*|emloc_.*|(torch_)?dtype|architectures|transformers_version|quantization_config|use_cache")
#: The classes that build observed models. A record may come from a stranger's output.
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
#: Fields of a family in a record, besides its towers. Observed families have no others.
_FIELDS = ("name", "model_types", "auto_class", "modality", "keep_dense")
#: The declarations of single configs that were looked at or recalled, by digest.
KNOWN: dict[str, Family] = {}


def digest(config: Mapping[str, Any]) -> str:
    """Return a digest of a config, the same for a model, its emulator and a merged model.

    Args:
        config: the content of a ``config.json``.
    """
    return hashlib.sha256(json.dumps(_architecture(config), sort_keys=True).encode()).hexdigest()[:40]


def _architecture(content: Any) -> Any:
    if not isinstance(content, Mapping):
        return content
    return {name: _architecture(value) for name, value in content.items() if not _COSMETIC.fullmatch(str(name))}


def to_record(family: Family, config: Mapping[str, Any], summary: str) -> dict[str, Any]:
    """Return the record of an observed family.

    Args:
        family: as observed; its tiny configs and inputs are left out.
        config: the content of the ``config.json`` that it was observed for.
        summary: for people: a clause.
    """
    declared = {name: getattr(family, name) for name in _FIELDS}
    towers = [asdict(tower) for tower in family.towers]
    values = {"config": digest(config), "found": summary, "family": {**declared, "towers": towers}}
    return json.loads(json.dumps(values, default=sorted))


def from_record(record: Mapping[str, Any]) -> Family:
    """Return the family of a record, which is kept in it.

    Raises:
        TypeError, ValueError, KeyError: it is no valid record.
    """
    declared = {name: record["family"][name] for name in _FIELDS}
    names = {field.name for field in fields(Tower)}
    towers = [Tower(**{name: tower[name] for name in names}) for tower in record["family"]["towers"]]
    family = Family(**{**declared, "model_types": frozenset(declared["model_types"])}, towers=towers)
    require_types(family)
    if family.auto_class not in AUTO_CLASSES:
        raise ValueError(f"{family.auto_class!r} builds no model that can be observed")
    return replace(family, observed=(record,))


def recall(manifest: Mapping[str, Any] | None) -> None:
    """Use the declarations that an output was made with, rather than look again.

    Args:
        manifest: the output's; None if it is no output.
    """
    records = (manifest or {}).get(DECLARATIONS)
    for record in records if isinstance(records, list) else ():
        with suppress(TypeError, ValueError, KeyError, AttributeError):  # it is damaged: look again
            KNOWN[str(record["config"])] = from_record(record)
