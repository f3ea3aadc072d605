"""``emloc report``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import as_json, print_json


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
              help="Where to write the page.  [default: report.html in RUN]")  # fmt: skip
@as_json
def command(run: Path, output: Path | None, as_json: bool) -> None:
    """Write one HTML page about RUN, the output directory of emloc run.

    It shows what was done, the memory planned and measured, the losses of tuning, the error of every layer, the
    corrections that were compared, and the scores. The page is self-contained: it loads nothing else,
    so you can send it as it is.
    """
    from emloc_core.recipe.page import write_page

    page = write_page(run, output or run / "report.html")
    if as_json:
        print_json({"page": str(page)})
    else:
        click.echo(f"wrote {page}")
