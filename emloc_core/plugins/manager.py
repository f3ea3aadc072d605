"""Loads plugins, isolates broken ones, and reports them.

With pluggy's own loader, one plugin's ImportError ends the program, and its hook calls end at the first plugin that
raises, so entry points are loaded and plugins are called one by one here. ``EMLOC_STRICT_PLUGINS=1`` raises instead
of isolating; ``EMLOC_TRACE_PLUGINS=1`` prints every hook call; ``EMLOC_STRICT_FAMILIES=1`` refuses models that no
plugin declares by its model type. Empty or ``0`` counts as unset.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

import click
import pluggy

from emloc_core import hookspecs
from emloc_core.compat.model_types import has_model_type
from emloc_core.errors import EmlocError, did_you_mean
from emloc_core.family import Family, require_types
from emloc_core.layout import Gguf, Layout
from emloc_core.objective import Objective
from emloc_core.plugins import builtin
from emloc_core.plugins.builtin import ALGORITHMS, COMMANDS
from emloc_core.plugins.report import PluginReport, is_on

PROJECT = GROUP = "emloc"
#: The variable that refuses families that are observed.
STRICT = "EMLOC_STRICT_FAMILIES"
#: The core's own objective.
TOKENS = "tokens"
#: What to do about a model type that no family declares: if transformers has it, and if not.
_DECLARE = (
    "Install a plugin that declares it, or write one: `emloc families scaffold MODEL` drafts the declaration, `emloc "
    "families new NAME` writes the package around it (docs/plugins.md)."
)
_FOREIGN = (
    "Code that comes with a model is never run: use a version of the model in transformers' own classes, or a plugin "
    "that imports its layout (the hook emloc_layouts)."
)
Declared = TypeVar("Declared", Family, Layout)


class PluginManager(pluggy.PluginManager):
    """pluggy's manager with the hooks of :mod:`emloc_core.hookspecs` and a report of every plugin found."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(hookspecs)
        self.reports: list[PluginReport] = []
        self._families: dict[str, Family] = {}
        self._layouts: dict[str, Layout] = {}
        self._commands: dict[str, click.Command] = {}
        self._objectives: dict[str, Objective] = {}
        self._reported: set[str] = set()
        if is_on("EMLOC_TRACE_PLUGINS"):
            self.trace.root.setwriter(lambda text: click.echo(f"emloc: {text}", err=True, nl=False))
            self.enable_tracing()

    def load(self, entries: Sequence[EntryPoint]) -> None:
        """Load and register the entry points one by one: errors of a plugin are recorded in its report.

        Raises:
            EmlocError: a plugin is broken and ``EMLOC_STRICT_PLUGINS`` is set.
        """
        for entry in sorted(entries, key=_order):
            report = PluginReport(entry.name, _distribution(entry))
            try:
                families = self.add(entry.load(), entry.name)
                report = replace(report, families=tuple(family.name for family in families))
            except (Exception, SystemExit) as error:
                report = report.broken(error)
            self.reports.append(report)

    def add(self, plugin: Any, name: str) -> list[Family]:
        """Register a plugin with all its declarations; return its families.

        Raises:
            BaseException: whatever the plugin raises, or what is wrong with it; it is not registered then.
        """
        if self.has_plugin(name) or self.is_registered(plugin):  # pluggy's message would list all its attributes
            raise ValueError(f"a plugin {self.get_name(plugin) or name!r} is already loaded")
        self.register(plugin, name=name)
        try:
            self._check_hooks(plugin)
            families = self._declared(plugin, "emloc_families", Family)
            layouts = self._declared(plugin, "emloc_layouts", Layout, families)
            commands = self._commands_of(plugin)
            objectives = {name: make() for name, make in self._offered(plugin, "objectives", self._objectives).items()}
        except BaseException:
            self.unregister(plugin)
            raise
        self._families.update((family.name, family) for family in families)
        self._commands.update(commands)
        self._layouts.update((layout.name, layout) for layout in layouts)
        self._objectives.update(objectives)
        return families

    def _call(self, plugin: Any, hook: str, **arguments: Any) -> list[Any]:
        """Call a hook of a single plugin and return its results: none if it does not implement the hook."""
        others = [other for other in self.get_plugins() if other is not plugin]
        return self.subset_hook_caller(hook, others)(**arguments)

    def _listed(self, plugin: Any, hook: str) -> list[Any]:
        """Return what is in the list that a plugin's hook returns; nothing if it does not implement the hook."""
        results = self._call(plugin, hook)
        for result in results:
            if not isinstance(result, list | tuple):  # a string would be taken for a list of letters
                raise TypeError(f"{hook} returned {type(result).__name__}, not a list")
        return [item for items in results for item in items]

    def _check_hooks(self, plugin: Any) -> None:
        hooks = [name for name in vars(hookspecs) if name.startswith("emloc_")]
        for caller in self.get_hookcallers(plugin) or []:
            if caller.name not in hooks:
                raise TypeError(f"there is no hook {caller.name!r}.{did_you_mean(caller.name, hooks)}")
        for name in hooks:  # pluggy passes over functions that are not marked
            if callable(getattr(plugin, name, None)) and self.parse_hookimpl_opts(plugin, name) is None:
                raise TypeError(f"{name} is not marked @hookimpl (from emloc_core.hookspecs import hookimpl)")

    def _declared(self, plugin: Any, hook: str, kind: type[Declared], own: Sequence[Family] = ()) -> list[Declared]:
        """Return a plugin's declarations; names and model types must differ from all others, and from ``own`` ones."""
        existing: list[Family | Layout] = [*self._families.values(), *self._layouts.values(), *own]
        declared = self._listed(plugin, hook)
        for item in declared:
            if not isinstance(item, kind):
                raise TypeError(f"{hook} returned {type(item).__name__}, not {kind.__name__}")
            require_types(item)
            for other in existing:
                if isinstance(other, kind) and item.name == other.name:
                    raise ValueError(f"the {kind.__name__.lower()} {item.name!r} is already declared")
                if shared := item.model_types & other.model_types:
                    raise ValueError(f"{other.name!r} already declares the model types {sorted(shared)}")
            existing.append(item)
        return declared

    def _commands_of(self, plugin: Any) -> dict[str, click.Command]:
        commands: dict[str, click.Command] = {}
        for command in self._listed(plugin, "emloc_commands"):
            if not isinstance(command, click.Command) or not command.name:
                raise TypeError(f"emloc_commands returned {command!r}, not a command with a name")
            if command.name in {*COMMANDS, *self._commands, *commands}:
                raise ValueError(f"there is already a command {command.name!r}")
            commands[command.name] = command
        return commands

    def families(self) -> list[Family]:
        """Return all families, by name."""
        return sorted(self._families.values(), key=lambda family: family.name)

    @contextmanager
    def declaring(self, family: Family) -> Iterator[None]:
        """Use a family, installed or not, for its model types in this process while the context is active."""
        installed = self._families
        others = {name: other for name, other in installed.items() if name != family.name}
        self._families = {family.name: family, **others}
        try:
            yield
        finally:
            self._families = installed

    def family_for(self, config: Mapping[str, Any], *, where: str = "") -> Family:
        """Return the family that declares the ``model_type`` of a config, including the models nested in it.

        If none does, a tiny model of this very config is observed.

        Args:
            config: the content of a ``config.json``.
            where: which part of another config this is, for messages.

        Raises:
            EmlocError: there is none; the message says why, and how to add one.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise EmlocError(f"The model type{where} is {model_type!r}, not a name.", "Correct the config.json.")
        family = _of_type(self._families.values(), model_type)
        if family is None:
            if layout := _of_type(self._layouts.values(), model_type):
                raise EmlocError(
                    f"A checkpoint of model type {model_type!r} has the layout {layout.name!r}, not that of "
                    "transformers' own classes.",
                    "Run `emloc import MODEL -o DIRECTORY` first, and give that directory.",
                    code="unsupported",
                )
            # By name, because that module is in a higher layer.
            family = None if is_on(STRICT) else import_module("emloc_core.observed.look").family_of(config)
        if family is None:
            missing, remedy = "", _DECLARE
            if self.objective_for(config).type_key == "model_type" and not has_model_type(model_type):
                missing, remedy = ", and transformers has no such model type", _FOREIGN
            raise EmlocError(
                f"No installed family declares the model type {model_type!r}{where}{missing}. "
                f"{_list(self._families.values())}.",
                remedy,
                code="unsupported",
            )
        for part, path in family.nested.items():
            inner = config.get(part)
            if not isinstance(inner, Mapping):
                raise EmlocError(
                    f"The config of this {model_type!r} has no {part}, which describes the model inside it.",
                    "Save the model again with transformers, which writes that part in full.",
                )
            label = f", the {part} of this {model_type!r}"
            family = family.with_nested(self.family_for(inner, where=label), path)
        return family

    def layout_for(self, config: Mapping[str, Any]) -> Layout:
        """Return the layout that reads checkpoints of the ``model_type`` of a config.

        Raises:
            EmlocError: none does.
        """
        model_type = config.get("model_type")
        if layout := _of_type(self._layouts.values(), model_type):
            return layout
        if _of_type(self._families.values(), model_type):
            raise EmlocError(
                f"A checkpoint of model type {model_type!r} needs no import: a family already declares it.",
                "Use it with the other commands directly.",
            )
        raise EmlocError(
            f"No installed plugin imports checkpoints of model type {model_type!r}. {_list(self._layouts.values())}.",
            "Install a plugin that declares the layout (the hook emloc_layouts).",
            code="unsupported",
        )

    def gguf_for(self, model_type: str) -> Gguf | None:
        """Return how models of a type are written as GGUF; None if no plugin says."""
        for owner, plugin in self.list_name_plugin():
            with self.isolated(owner):
                layouts = self._listed(plugin, "emloc_gguf")
                if layout := next((item for item in layouts if model_type in item.architectures), None):
                    return layout
        return None

    def commands(self) -> dict[str, click.Command]:
        """Return the plugins' commands by name."""
        return dict(self._commands)

    def algorithm(self, hook: str, name: str) -> Any:
        """Return the algorithm ``name`` from the hook ``emloc_{hook}``: emulators, corrections.

        Plugins are called now, not when they are loaded, since algorithms need torch.

        Raises:
            EmlocError: no plugin provides one of that name.
        """
        offered: dict[str, Any] = {}
        for owner, plugin in self.list_name_plugin():
            with self.isolated(owner):
                offered.update(self._offered(plugin, hook, offered))
        if name not in offered:
            raise _not_offered(hook, name, offered)
        return offered[name]

    def objectives(self) -> list[Objective]:
        """Return all objectives."""
        return list(self._objectives.values())

    def objective_for(self, config: Mapping[str, Any]) -> Objective:
        """Return the objective of models with such a config, by the key in it that names their architecture."""
        others = (objective for name, objective in self._objectives.items() if name != TOKENS)
        return next((objective for objective in others if objective.type_key in config), self._objectives[TOKENS])

    def objective_of(self, family: Family) -> Objective:
        """Return the objective of a family's models.

        Raises:
            EmlocError: no plugin provides it.
        """
        if family.objective not in self._objectives:
            raise _not_offered("objectives", family.objective, self._objectives)
        return self._objectives[family.objective]

    def require(self, hook: str, name: str) -> None:
        """Refuse the name of an algorithm that no plugin provides; imports torch only to ask other plugins."""
        if name in ALGORITHMS[hook]:
            return
        if any(caller.plugin is not builtin for caller in getattr(self.hook, f"emloc_{hook}").get_hookimpls()):
            self.algorithm(hook, name)
        else:
            raise _not_offered(hook, name, ALGORITHMS[hook])

    def _offered(self, plugin: Any, hook: str, existing: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a plugin offers, by name; no name may be among the ``existing`` ones."""
        offered: dict[str, Any] = {}
        for algorithms in self._call(plugin, f"emloc_{hook}"):
            for name, algorithm in algorithms.items():
                if not callable(algorithm):
                    raise TypeError(f"emloc_{hook} returned {algorithm!r} as {name!r}, which cannot be called")
                if name in existing:
                    raise ValueError(f"another plugin already provides {name!r} among the {hook}")
                offered[name] = algorithm
        return offered

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call the observers of ``hook``, such as ``emloc_block_done``; one that raises does not affect the others.

        Each receives copies of the arguments, which it may modify.

        Raises:
            EmlocError: an observer raises and ``EMLOC_STRICT_PLUGINS`` is set.
        """
        for owner, plugin in self.list_name_plugin():
            with self.isolated(owner):
                self._call(plugin, hook, **deepcopy(arguments))

    def registries(self) -> Iterator[tuple[str, list[Path]]]:
        """Yield the name of every plugin that provides registry entries, with their paths."""
        for owner, plugin in self.list_name_plugin():
            paths: list[Path] = []
            with self.isolated(owner):
                paths = [Path(path) for path in self._listed(plugin, "emloc_registry")]
            if paths:
                yield owner, paths

    @contextmanager
    def isolated(self, owner: str) -> Iterator[None]:
        """Isolate a plugin that raises within the context: its report gets the error, printed once on stderr."""
        try:
            yield
        except (Exception, SystemExit) as error:
            reports = {report.name: report for report in self.reports}
            broken = reports.get(owner, PluginReport(owner, "unknown")).broken(error)
            if owner not in self._reported:
                self._reported.add(owner)
                click.echo(f"emloc: the plugin {owner!r} of {broken.distribution} is broken: {broken.error}", err=True)
                self.reports = [broken if report.name == owner else report for report in self.reports]


def _of_type(declared: Iterable[Declared], model_type: Any) -> Declared | None:
    """Return the declaration that covers a model type, if one does."""
    return next((item for item in declared if model_type in item.model_types), None)


def _list(declared: Iterable[Family | Layout]) -> str:
    """Return the names of all declarations as text, with their model types."""
    lines = sorted(f"{item.name} ({', '.join(sorted(item.model_types))})" for item in declared)
    return f"Known: {'; '.join(lines) or 'none'}"


def _not_offered(hook: str, name: str, offered: Iterable[str]) -> EmlocError:
    names = sorted(offered)
    return EmlocError(
        f"There is no {name!r} among the {hook}: {', '.join(names)}.{did_you_mean(name, names)}",
        "Choose one of these, or install the plugin that provides it.",
    )


def _order(entry: EntryPoint) -> tuple[bool, str]:
    """Sort emloc's own plugins first: if two declare the same, the later one, never emloc's, counts as broken."""
    return (_distribution(entry) != PROJECT, entry.name)


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "unknown"


@cache
def plugin_manager() -> PluginManager:
    """Return the process's plugin manager, with the built-in algorithms and every installed plugin loaded."""
    manager = PluginManager()
    manager.add(builtin, "emloc_core")
    manager.load(entry_points(group=GROUP))
    return manager
