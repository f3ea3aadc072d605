"""Diffusion transformers of diffusers, tuned on pictures with prompts: FLUX.1 and FLUX.2, Qwen-Image, SD3.5, Z-Image.

They learn by flow matching. Imports nothing heavy.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from emloc_core.family import Family
from emloc_core.hookspecs import hookimpl
from emloc_diffusers.families import FAMILIES
from emloc_diffusers.objective import FlowMatching

if TYPE_CHECKING:
    import click


@hookimpl
def emloc_families() -> list[Family]:
    """Declare the transformers."""
    return FAMILIES


@hookimpl
def emloc_commands() -> "list[click.Command]":
    """Add ``emloc pictures``."""
    from emloc_diffusers.command import command

    return [command]


@hookimpl
def emloc_objectives() -> dict[str, Callable[..., Any]]:
    """Provide flow matching."""
    return {"flow": FlowMatching}
