"""What is known of an installed plugin."""

import os
from dataclasses import dataclass, replace

from emloc_core.errors import EmlocError


@dataclass(frozen=True)
class PluginReport:
    """An installed plugin: its distribution and, if it is broken, why."""

    name: str
    distribution: str
    families: tuple[str, ...] = ()
    error: str | None = None

    def broken(self, error: BaseException) -> "PluginReport":
        """Return the report of the plugin, which raised an error.

        Raises:
            EmlocError: ``EMLOC_STRICT_PLUGINS`` is set.
        """
        if is_on("EMLOC_STRICT_PLUGINS"):
            raise EmlocError(
                f"The plugin {self.name!r} of {self.distribution} is broken: {error!r}.",
                "Fix or uninstall it, or unset EMLOC_STRICT_PLUGINS to continue without it.",
                code="plugin",
            ) from error
        return replace(self, error=f"{type(error).__name__}: {error}")


def is_on(variable: str) -> bool:
    """Return whether an environment variable is set to something other than 0."""
    return os.environ.get(variable, "") not in ("", "0")
