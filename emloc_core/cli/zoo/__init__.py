"""``emloc zoo``: many models at once; its subcommands are one file each."""

import rich_click as click

from emloc_core.cli.zoo import convert, list, plan, report, show, status


@click.group("zoo")
def command() -> None:
    """Convert many models, on this machine or a cluster, without losing work.

    list, show and plan show what the registry knows; convert makes the emulators and, given rows, tunes and evaluates;
    status shows progress, and report the results.
    """


for module in (list, show, plan, convert, status, report):
    command.add_command(module.command)
