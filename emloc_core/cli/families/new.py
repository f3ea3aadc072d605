"""``emloc families new``."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from emloc_core.cli.console import as_json, print_json

if TYPE_CHECKING:
    from emloc_core.scaffold.draft import Draft


@click.command("new")
@click.argument("name")
@click.option(
    "--model-type",
    "model_types",
    multiple=True,
    metavar="TYPE",
    help="The model_type in config.json; repeatable.  [default: that of --from, or NAME]",
)
@click.option(
    "--from",
    "model",
    metavar="CONFIG_OR_MODEL",
    help="Declare what `emloc families scaffold` finds in this model.  [default: the most common layout]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to create.  [default: emloc-NAME]")
@as_json
def command(name: str, model_types: tuple[str, ...], model: str | None, output: Path | None, as_json: bool) -> None:
    """Write a plugin package that declares the model family NAME.

    The package has the declaration, tests, pyproject.toml and a README. A decoder needs no edits if its blocks are
    model.layers, with self_attn.{q,k,v,o}_proj and mlp.{gate,up,down}_proj.
    """
    from emloc_core.scaffold.package import write_plugin

    directory = output or Path(f"emloc-{name}".replace("_", "-"))
    draft = _draft(model) if model else None
    paths = write_plugin(name, directory, model_types, draft)
    commands = ["pip", "install", "--editable", directory], ["emloc", "families", "check", name], ["pytest", directory]
    steps = [shlex.join(map(str, command)) for command in commands]
    notes = draft.notes if draft else []
    if as_json:
        print_json({"name": name, "output": str(directory), "files": paths, "notes": notes, "next": steps})
        return
    for path in paths:
        click.echo(directory / path)
    click.echo(f"\nRead {directory / f'emloc_{name}' / '__init__.py'}, and change what differs in your model.")
    for note in notes:
        click.echo(f"  {note}")
    click.echo("Then:")
    for step in steps:
        click.echo(f"  {step}")


def _draft(model: str) -> "Draft":
    from emloc_core.files.checkpoint import find_config
    from emloc_core.scaffold.scaffold import scaffold

    return scaffold(find_config(model))
