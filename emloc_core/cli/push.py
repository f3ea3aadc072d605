"""``emloc push``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import as_json, print_json


@click.command("push")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--public", is_flag=True, help="Make a new repository public; by default it is private.")
@click.option("--with-rows", is_flag=True, help="Publish the rows of your data that an emulator or evaluation holds.")
@click.option("--base", help="Hub id of the base, if DIRECTORY names it by a local path.")
@as_json
def command(directory: Path, repository: str, public: bool, with_rows: bool, base: str | None, as_json: bool) -> None:
    """Upload DIRECTORY, a finished output, to REPOSITORY (organisation/name) on the Hugging Face hub.

    The card says what it was made from and how; paths of this machine are left out. Log in with `hf auth login` first.
    """
    from emloc_core.files.hub import push

    address = push(directory, repository, private=not public, with_rows=with_rows, base=base)
    if as_json:
        print_json({"repository": repository, "commit": address})
    else:
        click.echo(f"{directory} is at {address}")
