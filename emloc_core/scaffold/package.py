"""Writes the package of a plugin that declares a family, from the template in ``plugins/emloc_template``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from emloc_core import __version__
from emloc_core.errors import EmlocError
from emloc_core.files.workspace import Workspace
from emloc_core.plugins.manager import plugin_manager
from emloc_core.scaffold.draft import Draft


def write_plugin(name: str, directory: Path, model_types: Sequence[str] = (), draft: Draft | None = None) -> list[str]:
    """Write a plugin package: declaration, tests, ``pyproject.toml`` and README; all of it or nothing.

    Args:
        name: name of the family, a Python identifier. The package is ``emloc_NAME``.
        model_types: values of ``model_type`` that it declares; by default the draft's, or ``name``.
        draft: the declaration, instead of the template's.

    Returns:
        The files that were written, relative to ``directory``.

    Raises:
        EmlocError: ``name`` is no identifier or is in use, a model type is declared already, or ``directory`` exists or
            cannot be written.
    """
    model_types = list(dict.fromkeys(model_types)) or (sorted(draft.family.model_types) if draft else [name])
    _check(name, model_types)
    if directory.exists():
        raise EmlocError(
            f"{directory} already exists.", "Choose another directory with -o, or remove this one.", code="exists"
        )
    content = _render(name, model_types)
    if draft:
        tiny = [
            {**config, "model_type": model_type} for model_type in model_types for config in draft.family.tiny_configs
        ]
        family = replace(draft.family, name=name, model_types=frozenset(model_types), tiny_configs=tiny)
        content[f"emloc_{name}/__init__.py"] = replace(draft, family=family).source
    try:
        _publish(content, directory)
    except OSError as error:
        raise EmlocError(f"{directory} cannot be written: {error.strerror}.", "Choose another directory.") from error
    return sorted(content)


def name_for(model_type: str) -> str:
    """Return a name for the family of a model type: the type's, unless a family of other types has it."""
    name = model_type.replace("-", "_")  # part of a package's name, too
    taken_names = {family.name for family in plugin_manager().families() if model_type not in family.model_types}
    while name in taken_names:
        name += "_model"
    return name


def _publish(content: Mapping[str, str], directory: Path) -> None:
    workspace = Workspace(directory)
    with workspace.hold():
        try:
            workspace.clear()
            for path, text in content.items():
                (workspace.content / path).parent.mkdir(parents=True, exist_ok=True)
                (workspace.content / path).write_text(text, encoding="utf-8")
            workspace.content.rename(directory)
        finally:
            workspace.discard()


def _check(name: str, model_types: Sequence[str]) -> None:
    if not (name.isidentifier() and name.isascii()) or name.endswith("_"):
        raise EmlocError(
            f"{name!r} cannot be part of a Python package's name.",
            "Use letters, digits and underscores, such as my_model, and --model-type for the model type.",
        )
    manager = plugin_manager()
    if name in {family.name for family in manager.families()} | {report.name for report in manager.reports}:
        raise EmlocError(f"A plugin or family {name!r} is already installed.", "Choose another name.", code="exists")
    if find_spec(f"emloc_{name}"):
        raise EmlocError(
            f"There is already a package emloc_{name}, which this one would hide.",
            "Choose another name.",
            code="exists",
        )
    for family in manager.families():
        if shared := family.model_types.intersection(model_types):
            raise EmlocError(
                f"The installed family {family.name!r} declares {', '.join(sorted(shared))} already.",
                "Such models need no other plugin; name the model types of yours with --model-type.",
            )


def _render(name: str, model_types: Sequence[str]) -> dict[str, str]:
    """Return the content of every file, by path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("emloc_template", "")
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)
    values = {
        "name": name,
        "package": f"emloc_{name}",
        "distribution": f"emloc-{name}".replace("_", "-"),
        "model_types": json.dumps(model_types),
        "shown_types": ", ".join(f"`{model_type}`" for model_type in model_types),
        "version": __version__,
    }
    return {
        path.replace("NAME", name).removesuffix(".jinja"): environment.get_template(path).render(values)
        for path in environment.list_templates(["jinja"])
    }
