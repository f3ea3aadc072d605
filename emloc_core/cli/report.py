"""``emloc report``."""

from contextlib import suppress
from pathlib import Path

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.errors import EmlocError


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
              help="Where to write the page.  [default: report.html in RUN]")  # fmt: skip
@click.option("--serve", is_flag=True, help="Serve the page, to this machine only, while the run lasts.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="N",
              help="With --serve: the port.  [default: a free one]")  # fmt: skip
@as_json
def command(run: Path, output: Path | None, serve: bool, port: int, as_json: bool) -> None:
    """Write one HTML page about RUN, the output directory of emloc run.

    It shows what was done, the memory planned and measured, the losses of tuning, the error of every layer, the
    corrections that were compared, and the scores. The page is self-contained: it loads nothing else,
    so you can send it as it is. With --serve, it shows the current state, with the running stage, and refreshes itself.
    """
    if serve and (as_json or output is not None):
        raise EmlocError("--serve writes no page.", "Leave out -o and --json, or --serve.")
    if port and not serve:
        raise EmlocError("--port has no effect without --serve.", "Add --serve, or leave out --port.")
    if serve:
        _serve(run, port)
        return
    from emloc_core.recipe.page import write_page

    page = write_page(run, output or run / "report.html")
    if as_json:
        print_json({"page": str(page)})
    else:
        click.echo(f"wrote {page}")


def _serve(run: Path, port: int) -> None:
    from emloc_core.recipe.serve import server

    with server(run, port) as serving:
        click.echo(f"http://{serving.server_address[0]!s}:{serving.server_port}/  (Ctrl-C stops it)")
        with suppress(KeyboardInterrupt):
            serving.serve_forever()
