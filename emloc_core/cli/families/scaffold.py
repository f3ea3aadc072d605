"""``emloc families scaffold``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.cli.following import join
from emloc_core.errors import EmlocError
from emloc_core.files.documents import write_text


@click.command("scaffold")
@click.argument("model", metavar="CONFIG_OR_MODEL")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="File to write the module to.")
@click.option("--check", is_flag=True, help="Run the conformance kit on the draft, and add its findings.")
@as_json
def command(model: str, output: Path | None, check: bool, as_json: bool) -> None:
    """Draft a declaration for an architecture that no family declares yet.

    CONFIG_OR_MODEL is a config.json, a directory, or a hub id, from which only the config is downloaded. Blocks and
    Linears are found in the model without weights; which Linears read the same input is observed in the forward pass of
    a tiny model of the same architecture. Comments above the declaration list what to check or edit.
    """
    if output is not None and output.exists():
        raise EmlocError(f"{output} already exists.", "Choose another file, or remove this one.", code="exists")

    from emloc_core.files.checkpoint import find_config
    from emloc_core.plugins.manager import plugin_manager

    config_file = find_config(model)

    from emloc_core.scaffold.scaffold import check_draft, scaffold

    draft = scaffold(config_file)
    faults: list[str] = []
    if check:
        noted, draft = len(draft.notes), check_draft(draft)
        faults = draft.notes[noted:]
    if output is not None:
        write_text(output, draft.source)
    if as_json:
        print_json({**draft.describe(), "output": str(output) if output else None, "checked": check})
    elif output is None:
        click.echo(draft.source, nl=False)
    else:
        for note in draft.notes:
            click.echo(note)
        click.echo(f"{output}: {draft.summary}")
    if check and not faults:
        click.echo("The draft passes every check of the conformance kit.", err=True)
    if not any(family.model_types & draft.family.model_types for family in plugin_manager().families()):
        following = join("families", "new", draft.family.name, "--from", model)
        click.echo(f"Next: `{following}` writes a package that declares this.", err=True)
