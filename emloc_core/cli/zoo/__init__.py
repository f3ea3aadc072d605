"""``emloc zoo``: many models in one go; its subcommands are one file each."""

import rich_click as click

from emloc_core.cli.zoo import convert, list, plan, report, show, status


@click.group("zoo")
def command() -> None:
    """Convert many models, on this machine or a cluster, and lose nothing.

    list, show and plan say what the registry knows; convert makes the emulators, and more where there are rows to tune
    on; status says how far it is, and report what came of it.
    """


for module in (list, show, plan, convert, status, report):
    command.add_command(module.command)
