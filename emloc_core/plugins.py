"""Loads plugins, keeps a broken one from breaking anything else, and reports it.

pluggy's own loader lets one plugin's ImportError end the program, so entry points are loaded here one by one.
``EMLOC_STRICT_PLUGINS=1`` raises instead of isolating.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from emloc_core import hookspecs
from emloc_core.errors import EmlocError, did_you_mean
from emloc_core.family import Family

PROJECT = GROUP = "emloc"


@dataclass(frozen=True)
class PluginReport:
    """A plugin that was found: where it comes from and, if it is broken, why."""

    name: str
    distribution: str
    families: tuple[str, ...] = ()
    error: str | None = None


class PluginManager(pluggy.PluginManager):
    """pluggy's manager with the hooks of :mod:`emloc_core.hookspecs` and a report of every plugin found."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(hookspecs)
        self.reports: list[PluginReport] = []
        self._families: dict[str, Family] = {}

    def load(self, entries: Sequence[EntryPoint]) -> None:
        """Load and register the entry points, each on its own: what one does wrong is its own report's error.

        Raises:
            EmlocError: a plugin is broken and ``EMLOC_STRICT_PLUGINS`` is set.
        """
        for entry in sorted(entries, key=lambda entry: entry.name):
            distribution = entry.dist.name if entry.dist else "unknown"
            try:
                families = self._load_one(entry)
                self.reports.append(PluginReport(entry.name, distribution, tuple(family.name for family in families)))
            except Exception as error:
                if os.environ.get("EMLOC_STRICT_PLUGINS"):
                    raise EmlocError(
                        f"The plugin {entry.name!r} of {distribution} is broken: {error!r}.",
                        "Mend or uninstall it, or unset EMLOC_STRICT_PLUGINS to go on without it.",
                    ) from error
                self.reports.append(PluginReport(entry.name, distribution, error=f"{type(error).__name__}: {error}"))

    def _load_one(self, entry: EntryPoint) -> list[Family]:
        plugin = entry.load()
        self.register(plugin, name=entry.name)
        try:
            self._check_hook_names(plugin)
            families = self._families_of(plugin)
        except BaseException:
            self.unregister(plugin)
            raise
        self._families.update((family.name, family) for family in families)
        return families

    def _check_hook_names(self, plugin: Any) -> None:
        known = [name for name in vars(hookspecs) if name.startswith("emloc_")]
        for caller in self.get_hookcallers(plugin) or []:
            if caller.name not in known:
                raise TypeError(f"there is no hook {caller.name!r}.{did_you_mean(caller.name, known)}")

    def _families_of(self, plugin: Any) -> list[Family]:
        declare = getattr(plugin, "emloc_families", None)
        families = list(declare()) if declare else []
        for family in families:
            if not isinstance(family, Family):
                raise TypeError(f"emloc_families returned {type(family).__name__}, not Family")
            if family.name in self._families:
                raise ValueError(f"another plugin declares the family {family.name!r} already")
            for other in self._families.values():
                if shared := family.model_types & other.model_types:
                    raise ValueError(f"{other.name!r} declares the model types {sorted(shared)} already")
        return families

    def families(self) -> list[Family]:
        """Return all families, by name."""
        return sorted(self._families.values(), key=lambda family: family.name)

    def family_for(self, model_type: str) -> Family:
        """Return the family that declares ``model_type``.

        Raises:
            EmlocError: none does; the message lists the families and how to add one.
        """
        for family in self._families.values():
            if model_type in family.model_types:
                return family
        known = "; ".join(f"{family.name} ({', '.join(sorted(family.model_types))})" for family in self.families())
        raise EmlocError(
            f"No installed family declares the model type {model_type!r}. Known: {known or 'none'}.",
            "Install a plugin that declares it, or write one: docs/plugins.md shows the 20 lines it takes.",
        )

    def algorithm(self, hook: str, name: str) -> Any:
        """Return the algorithm ``name`` from the hook ``emloc_{hook}``: factorizers, corrections, rank_allocators.

        Raises:
            EmlocError: no plugin offers one of that name.
        """
        offered: dict[str, Any] = {}
        for found in getattr(self.hook, f"emloc_{hook}")():
            offered.update(found)
        if name not in offered:
            known = sorted(offered)
            raise EmlocError(
                f"There is no {name!r} among the {hook}: {', '.join(known)}.{did_you_mean(name, known)}",
                "Choose one of these.",
            )
        return offered[name]


@cache
def plugin_manager() -> PluginManager:
    """Return the process's plugin manager, with the built-in algorithms and every installed plugin loaded."""
    from emloc_core import algorithms

    manager = PluginManager()
    manager.register(algorithms, name="emloc_core")
    manager.load(list(entry_points(group=GROUP)))
    return manager
