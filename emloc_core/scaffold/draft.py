"""A family's declaration as the source of a plugin module, formatted."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from emloc_core.family import Family, Tower

WIDTH = 120
_DEFAULTS = {"auto_class": "AutoModelForCausalLM", "modality": "text"}


@dataclass(frozen=True)
class Draft:
    """A family as observed, and what a person has to know about it.

    Attributes:
        summary: sentences about the model that it was observed on.
        notes: what a person may want to know: each begins with ``Note``, ``Check`` (check that it is right), ``More``
            (what would compress more of the model), or ``Edit`` (the conformance kit will not accept it unchanged).
        text_only: whether the model takes images, but none could be made up for it.
        inputs: source of the body of the family's ``tiny_inputs``, if it has any.
    """

    family: Family
    summary: str
    notes: list[str] = field(default_factory=list)
    inputs: Sequence[str] = ()
    text_only: bool = False

    @property
    def source(self) -> str:
        """The plugin module in Python."""
        family = self.family
        name = family.name.upper()
        function = "tiny_inputs" if self.inputs else None
        parts = [
            f'"""The {family.name} family: a draft by ``emloc families scaffold``.\n\n{_wrap(self.summary)}\n"""\n'
        ]
        parts.append("from typing import Any\n" if self.inputs else "")
        imported = "Family, Tower" if family.towers else "Family"
        parts.append(f"from emloc_core.family import {imported}\nfrom emloc_core.hookspecs import hookimpl\n")
        if self.inputs:
            body = "\n".join(f"    {line}".rstrip() for line in self.inputs)
            parts.append(
                f"\ndef {function}(config: Any) -> dict[str, Any]:\n"
                f'    """Return a row with one image, for the tiny model."""\n{body}\n\n'
            )
        notes = "".join(f"{_wrap(note, '# ', '#   ')}\n" for note in self.notes)
        parts.append(f"{notes}{name} = {_render(_call(family, function), len(name) + 3)}\n\n")
        parts.append(
            f'@hookimpl\ndef emloc_families() -> list[Family]:\n    """Declare the family."""\n    return [{name}]\n'
        )
        return "\n".join(part for part in parts if part)

    def describe(self) -> dict[str, Any]:
        """Return the draft as JSON values."""
        family = self.family
        return {
            "name": family.name,
            "model_types": sorted(family.model_types),
            "auto_class": family.auto_class,
            "modality": family.modality,
            "towers": [{f.name: getattr(tower, f.name) for f in fields(tower)} for tower in family.towers],
            "keep_dense": dict(family.keep_dense),
            "tiny_configs": [dict(config) for config in family.tiny_configs],
            "summary": self.summary,
            "notes": self.notes,
            "source": self.source,
        }


@dataclass(frozen=True)
class _Call:
    """An expression with arguments: ``name(a, key=b)``."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class _Name:
    """An expression that is written verbatim."""

    text: str


def _call(family: Family, function: str | None) -> _Call:
    types = ", ".join(_quoted(name) for name in sorted(family.model_types))
    arguments: dict[str, Any] = {
        "name": family.name,
        "model_types": _Name(f"frozenset({{{types}}})"),
        "auto_class": family.auto_class,
        "modality": family.modality,
        "towers": [_Call("Tower", _without_defaults(tower)) for tower in family.towers],
        "keep_dense": dict(family.keep_dense),
        "tiny_configs": [dict(config) for config in family.tiny_configs],
    }
    if function:
        arguments["tiny_inputs"] = _Name(function)
    explicit = {name: value for name, value in arguments.items() if value and _DEFAULTS.get(name) != value}
    return _Call("Family", {**explicit, "towers": arguments["towers"]})


def _without_defaults(tower: Tower) -> dict[str, Any]:
    return {f.name: value for f in fields(tower) if (value := getattr(tower, f.name)) != f.default}


def _render(value: Any, before: int, indent: int = 0) -> str:
    """Return ``value`` as source: on one line if it fits, otherwise one entry per line.

    Args:
        before: columns before it in its first line.
        indent: indentation of its line.
    """
    flat = _flat(value)
    if before + len(flat) + 1 <= WIDTH or not isinstance(value, list | dict | _Call):
        return flat
    margin = " " * (indent + 4)
    if isinstance(value, list):
        opening, closing = "[", "]"
        entries = [("", item) for item in value]
    elif isinstance(value, dict):
        opening, closing = "{", "}"
        entries = [(f"{_quoted(key)}: ", item) for key, item in value.items()]
    else:
        opening, closing = f"{value.name}(", ")"
        entries = [(f"{key}=", item) for key, item in value.arguments.items()]
    lines = [f"{margin}{key}{_render(item, len(margin) + len(key), indent + 4)}," for key, item in entries]
    return "\n".join([opening, *lines, " " * indent + closing])


def _flat(value: Any) -> str:
    if isinstance(value, _Name):
        return value.text
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, _Call):
        return f"{value.name}({', '.join(f'{key}={_flat(item)}' for key, item in value.arguments.items())})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)}: {_flat(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flat, value))}]"
    return f'float("{value}")' if value in (math.inf, -math.inf) else repr(value)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _wrap(text: str, first: str = "", following: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=following, break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip
