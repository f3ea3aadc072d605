"""The demos, which need no preparation.

``emloc demo`` shows the whole method on a real small model and a real task in minutes, ``emloc demo-full`` compares all
ways to tune it, ``emloc demo-vision`` reads pictures, ``emloc demo-diffusion`` draws them, and ``emloc demo-zoo``
converts many models at a time.
"""

from collections.abc import Sequence

import click

from emloc_core.hookspecs import hookimpl


@hookimpl
def emloc_commands() -> Sequence[click.Command]:
    """Add the commands."""
    from emloc_demo.command import command
    from emloc_demo.diffusion.command import command as diffusion
    from emloc_demo.full.command import command as full
    from emloc_demo.vision.command import command as vision
    from emloc_demo.zoo.command import command as zoo

    return [command, diffusion, full, vision, zoo]
