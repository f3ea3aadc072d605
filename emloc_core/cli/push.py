"""``emloc push``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import as_json, dry_run, print_json
from emloc_core.units import counted, human_bytes


@click.command("push")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--public", is_flag=True, help="Make a new repository public; by default it is private.")
@click.option("--with-rows", is_flag=True, help="Publish the rows of your data that an emulator or evaluation holds.")
@click.option("--base", help="Hub id of the base, if DIRECTORY names it by a local path.")
@dry_run
@as_json
def command(
    directory: Path, repository: str, public: bool, with_rows: bool, base: str | None, dry_run: bool, as_json: bool
) -> None:
    """Upload DIRECTORY, a finished output, to REPOSITORY (organisation/name) on the Hugging Face hub.

    The card says what it was made from and how; paths of this machine are left out. Log in with `hf auth login` first.
    """
    from emloc_core.files.hub import push, to_publish

    if dry_run:
        files, _ = to_publish(directory, repository, with_rows=with_rows, base=base)
        sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
        if as_json:
            print_json({"repository": repository, "private": not public, "files": sizes, "bytes": sum(sizes.values())})
            return
        for name, size in sizes.items():
            click.echo(f"{name}: {human_bytes(size)}")
        kept = "public" if public else "private"
        click.echo(f"{counted(len(sizes), 'file')}, {human_bytes(sum(sizes.values()))}, to {repository}, {kept} if new")
        return
    address = push(directory, repository, private=not public, with_rows=with_rows, base=base)
    if as_json:
        print_json({"repository": repository, "commit": address})
    else:
        click.echo(f"{directory} is at {address}")
