"""The commands ``emloc demo`` and ``emloc demo-vision``, the whole method on a real small model and a real task, and
``emloc demo-zoo``, many models at a time.

There is nothing to prepare: the first reads text, the second pictures.
"""

from collections.abc import Sequence

import click

from emloc_core.hookspecs import hookimpl


@hookimpl
def emloc_commands() -> Sequence[click.Command]:
    """Add the three commands."""
    from emloc_demo.command import command
    from emloc_demo.vision.command import command as vision
    from emloc_demo.zoo.command import command as zoo

    return [command, vision, zoo]
