"""The plugin contract. A plugin is a module in the entry-point group ``emloc`` with functions marked ``@hookimpl``.

Hooks may grow arguments and never lose them; ``API_VERSION`` counts the changes that a plugin author has to know.
"""

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import click

    from emloc_core.family import Family

API_VERSION = 1

hookspec = pluggy.HookspecMarker("emloc")
hookimpl = pluggy.HookimplMarker("emloc")


@hookspec
def emloc_families() -> "Sequence[Family]":  # type: ignore[empty-body]
    """Return the model families that the plugin declares."""


@hookspec
def emloc_rank_allocators() -> "dict[str, Callable[..., Any]]":  # type: ignore[empty-body]
    """Return rank allocators by name: ``f(shapes, ratio) -> ranks``, or ``f(shapes, ratio, spectra) -> ranks``.

    See ``emloc_core.allocation``.
    """


@hookspec
def emloc_factorizers() -> "dict[str, Callable[..., Any]]":  # type: ignore[empty-body]
    """Return factorisations by name: ``f(weight, gram, rank) -> Factors``, see ``emloc_core.factorize``."""


@hookspec
def emloc_corrections() -> "dict[str, Callable[..., Any]]":  # type: ignore[empty-body]
    """Return LoRA corrections by name: ``f(weight, u, v, lora, clamps) -> loras``, see ``emloc_core.correction``."""


@hookspec
def emloc_commands() -> "Sequence[click.Command]":  # type: ignore[empty-body]
    """Return commands to add to the ``emloc`` command line."""


@hookspec
def emloc_block_done(stage: str, path: str, index: int, total: int) -> None:
    """Observe that a stage has finished with a block: its module path, and its place among ``total`` blocks."""


@hookspec
def emloc_stage_done(stage: str, output: "Path", manifest: "dict[str, Any]") -> None:
    """Observe that a stage's output directory is there, newly made or found finished, with its ``emloc.json``.

    The command line calls it; the Python API does not.
    """
