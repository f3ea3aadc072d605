"""``emloc zoo status``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.cli.zoo.records import line, totals


@click.command("status")
@click.argument("zoo", type=click.Path(path_type=Path))
@as_json
def command(zoo: Path, as_json: bool) -> None:
    """Show the state of each job in ZOO, even while jobs run."""
    from emloc_core.zoo.state.store import Store

    records = Store(zoo).records()
    if as_json:
        print_json({"jobs": [record.to_dict() for record in records]})
        return
    width = max((len(record.job.name) for record in records), default=0)
    for record in records:
        click.echo(f"{record.job.name:<{width}}  {record.state:<11}  {line(record)}".rstrip())
    click.echo(totals(records))
