"""``emloc zoo show``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.cli.zoo.entries import more_entries


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
    click.echo(f"# {entry.file}\n{entry.file.read_text(encoding='utf-8').rstrip()}")
