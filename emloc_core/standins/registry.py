"""The formats by name: built-in ones, and those of plugins."""

from collections.abc import Mapping
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.plugins.manager import plugin_manager
from emloc_core.standins.format import METHOD, Format, kind_of


def format_named(name: str) -> Format:
    """Return the format of a kind of emulator.

    Raises:
        EmlocError: no plugin provides one of that name, or the format has another name, under which its emulators
            could not be loaded.
    """
    format: Format = plugin_manager().algorithm("emulators", name)()
    if format.name != name:
        raise EmlocError(
            f"The format that a plugin offers as {name!r} is named {format.name!r}: its emulators could not be loaded.",
            "Offer it under its name (docs/formats.md).",
            code="plugin",
        )
    return format


def format_of(config: Mapping[str, Any]) -> Format:
    """Return the format of an emulator, by its ``config.json``.

    Raises:
        EmlocError: no plugin provides it.
    """
    kind = kind_of(config)
    assert kind
    format = format_named(kind)
    return format.own() if config["quantization_config"]["quant_method"] == METHOD else format
