"""``emloc zoo show``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.cli.zoo.entries import more_entries

if TYPE_CHECKING:
    from emloc_core.registry.entry import Entry


@click.command("show")
@click.argument("model", metavar="ID")
@more_entries
@as_json
def command(model: str, registry: tuple[Path, ...], as_json: bool) -> None:
    """Show everything the registry knows about one model, and where each figure was published."""
    from emloc_core.errors import EmlocError
    from emloc_core.registry.registry import find, load_entries

    entry, *others = find(model, load_entries(registry))
    if others:
        names = ", ".join(match.id for match in (entry, *others))
        raise EmlocError(f"{model!r} matches several models: {names}.", "Name one; `emloc zoo list` lists several.")
    if as_json:
        print_json({**entry.model_dump(), "file": str(entry.file), "fingerprint": entry.fingerprint})
        return
    for name, value in _facts(entry):
        click.echo(f"{name:<12} {value}")


def _facts(entry: "Entry") -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = [
        ("id", entry.id),
        ("family", entry.family),
        ("licence", entry.licence),
        ("revision", entry.revision),
        ("layout", entry.layout and f"{entry.layout}: `emloc import` rewrites it"),
        ("checkpoint", entry.checkpoint),
    ]
    if entry.parameters:
        parameters = entry.parameters
        twice = "; it counts the tied output projection twice" if parameters.tied_twice else ""
        facts += [("size", f"{parameters.published} ({parameters.source}){twice}"), ("", parameters.note)]
    for name, preset in entry.presets.items():
        settings = preset.model_dump(exclude_none=True)
        facts.append(("preset", f"{name}: " + ", ".join(f"{key} {_shown(value)}" for key, value in settings.items())))
    if entry.data:
        facts += [(f"data {name}", _shown(value)) for name, value in entry.data.model_dump().items() if value]
    facts += [(f"{name} from", source) for name, source in entry.sources.items()]
    facts += _config(entry.config)
    return [(name, value) for name, value in [*facts, ("file", entry.file)] if value]


def _config(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the config as lines: one for its own fields and one for each nested config."""
    fields = {key: value for key, value in config.items() if not isinstance(value, dict)}
    facts = [(prefix or "config", ", ".join(f"{key} {_shown(value)}" for key, value in fields.items()))]
    for key, value in config.items():
        if isinstance(value, dict):
            facts += _config(value, key)
    return facts


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
