"""``emloc zoo list``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.cli.zoo.entries import more_entries, print_rows


@click.command("list")
@click.argument("pattern", default="*")
@more_entries
@as_json
def command(pattern: str, registry: tuple[Path, ...], as_json: bool) -> None:
    """List the models of the registry, including those from plugins.

    PATTERN is an id with or without its organisation, or a quoted glob: 'model-*'.
    """
    from emloc_core.registry.registry import find, load_entries

    entries = find(pattern, load_entries(registry))
    if as_json:
        listed = [
            {
                "id": entry.id,
                "family": entry.family,
                "parameters": entry.parameters.published if entry.parameters else None,
                "licence": entry.licence,
                "layout": entry.layout,
                "presets": list(entry.presets),
                "file": str(entry.file),
            }
            for entry in entries
        ]
        print_json({"entries": listed})
        return
    print_rows(
        {"model": "left", "family": "left", "published size": "right", "licence": "left", "presets": "left"},
        [
            [
                entry.id,
                entry.family,
                entry.parameters.published if entry.parameters else "-",
                entry.licence or "-",
                ", ".join(entry.presets),
            ]
            for entry in entries
        ],
    )
