"""``emloc zoo report``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.units import counted


@click.command("report")
@click.argument("zoo", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIRECTORY",
              help="Directory for the two files.  [default: the zoo]")  # fmt: skip
@as_json
def command(zoo: Path, output: Path | None, as_json: bool) -> None:
    """Write a report on ZOO: report.html and report.json.

    It lists every model with its sizes, the error of every layer, memory, time and scores, and every failure with its
    cause and the end of its log. The page is a single self-contained file. A report can be written at any time, even
    while jobs run.
    """
    from emloc_core.zoo.report.page import DATA, PAGE, write_report

    directory = output or zoo
    content = write_report(zoo, directory)
    if as_json:
        print_json(content)
        return
    states = ", ".join(f"{count} {state}" for state, count in content["summary"]["states"].items())
    click.echo(f"{counted(content['summary']['jobs'], 'job')}: {states or 'none yet'}")
    for name in (PAGE, DATA):
        click.echo(directory / name)
