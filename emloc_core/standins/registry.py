"""The formats by name: built-in ones, and those of plugins."""

from emloc_core.plugins.manager import plugin_manager
from emloc_core.standins.format import Format


def format_named(name: str) -> Format:
    """Return the format of a kind of emulator.

    Raises:
        EmlocError: no plugin provides one of that name.
    """
    found: Format = plugin_manager().algorithm("emulators", name)()
    return found
