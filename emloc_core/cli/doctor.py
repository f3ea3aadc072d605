"""``emloc doctor``."""

import sys
from dataclasses import asdict

import rich_click as click

from emloc_core.cli.console import as_json, print_json, working
from emloc_core.doctor import examine, is_healthy, lines

_COLOURS = {"note": "blue", "warning": "yellow", "error": "red"}


@click.command("doctor")
@as_json
def command(as_json: bool) -> None:
    """Check this installation: packages, GPU and driver, memory, disk, caches, plugins.

    Versions are compared with what EMLoC needs and with what it was tested with. The exit code is 1 if something is
    wrong. If even this command does not start, `python -m emloc_core.doctor` does the same.
    """
    with working("Importing everything"):
        checks = examine()
    if as_json:
        print_json({"healthy": is_healthy(checks), "checks": [asdict(check) for check in checks]})
    else:
        for line in lines(checks):
            click.secho(line, fg=_COLOURS.get(line.split()[0]))
    sys.exit(not is_healthy(checks))
