"""``emloc families new``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import as_json, print_json


@click.command("new")
@click.argument("name")
@click.option(
    "--model-type",
    "model_types",
    multiple=True,
    metavar="TYPE",
    help="model_type in the config.json of such models; repeatable; default: NAME.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to make; default: emloc-NAME.")
@as_json
def command(name: str, model_types: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    """Write a plugin package that declares the model family NAME.

    It holds the declaration, laid out as Llama until you change it, its tests, pyproject.toml and a README.
    """
    from emloc_core.new_family import write_plugin

    directory = output or Path(f"emloc-{name}".replace("_", "-"))
    written = write_plugin(name, directory, model_types)
    steps = [
        f"pip install --editable {directory}",
        f"emloc families check {name}",
        f"pytest {directory}",
    ]
    if as_json:
        print_json({"name": name, "output": str(directory), "files": written, "next": steps})
        return
    for path in written:
        click.echo(directory / path)
    click.echo(f"\nRead {directory / f'emloc_{name}' / '__init__.py'}, and change what is laid out otherwise. Then:")
    for step in steps:
        click.echo(f"  {step}")
