"""The command ``emloc demo``: the whole method on a real small model and a real task, with nothing to prepare."""

from collections.abc import Sequence

import click

from emloc_core.hookspecs import hookimpl


@hookimpl
def emloc_commands() -> Sequence[click.Command]:
    """Add ``emloc demo``."""
    from emloc_demo.command import command

    return [command]
