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
    from emloc_core.layout import Layout

API_VERSION = 2

hookspec = pluggy.HookspecMarker("emloc")
hookimpl = pluggy.HookimplMarker("emloc")


@hookspec
def emloc_families() -> "Sequence[Family]":  # type: ignore[empty-body]
    """Declare model families. Asked once, when the plugin is loaded: import nothing heavy here.

    Returns:
        The families. Names and model types are unique among all plugins.
    """


@hookspec
def emloc_layouts() -> "Sequence[Layout]":  # type: ignore[empty-body]
    """Declare layouts of checkpoints that ``emloc import`` rewrites as native ones. Asked when the plugin is loaded.

    Returns:
        The layouts, as ``emloc_core.layout.Layout``. Names are unique among all plugins, and so are the model types
        that they read, which no family declares.
    """


@hookspec
def emloc_rank_allocators() -> "dict[str, Callable[..., Any]]":  # type: ignore[empty-body]
    """Offer rank allocators, which ``compress`` and ``cut`` find by ``--allocator``. Asked when one is needed.

    Returns:
        By name, ``f(shapes, ratio) -> ranks``, asked before anything is computed, or ``f(shapes, ratio, spectra) ->
        ranks``, asked when the whole model has been decomposed. ``shapes`` is the (out_features, in_features) of every
        Linear, ``ratio`` the share of parameters to keep, in (0, 1), ``spectra`` an
        ``emloc_core.algorithms.Spectrum`` per Linear; ``ranks`` an int of at least 1 per Linear.
    """


@hookspec
def emloc_factorizers() -> "dict[str, Callable[..., Any]]":  # type: ignore[empty-body]
    """Offer factorisations of a weight, which ``compress`` finds by ``--factorizer``. Asked when one is needed.

    Returns:
        By name, ``f(weight, gram, rank) -> Factors``, as ``emloc_core.algorithms.factorize.factorize``. ``weight``
        is (m, n), ``gram`` an ``emloc_core.algorithms.Gram`` of the inputs or of the outputs, ``rank`` an int k; the
        factors are (m, k), with orthonormal columns, and (k, n).
    """


@hookspec
def emloc_corrections() -> "dict[str, Callable[..., Any]]":  # type: ignore[empty-body]
    """Offer corrections of a LoRA, which ``correct`` finds by ``--method``. Asked when one is needed.

    Returns:
        By name, ``f(weight, u, v, lora, clamps) -> loras``, as ``emloc_core.algorithms.correction.correct_lora``.
        ``weight`` is the base's, (m, n), ``u`` (m, k) and ``v`` (k, n) are the emulator's factors, ``lora`` is an
        ``emloc_core.algorithms.Lora``; a list of one Lora for every clamp is returned.
    """


@hookspec
def emloc_commands() -> "Sequence[click.Command]":  # type: ignore[empty-body]
    """Add commands to ``emloc``. Asked when the plugin is loaded, for ``emloc --help`` too: import nothing heavy here.

    Returns:
        Commands of click, with names that are not taken.
    """


@hookspec
def emloc_registry() -> "Sequence[Path]":  # type: ignore[empty-body]
    """Bring entries of the registry: models that are planned and converted by name. Asked when entries are needed.

    Returns:
        Paths of entries, TOML files as ``emloc_core.registry.entry.Entry`` describes them, or of directories of them.
        Ids are unique among all plugins.
    """


@hookspec
def emloc_block_done(stage: str, path: str, index: int, total: int) -> None:
    """Observe that a stage has finished with a block.

    Args:
        stage: the command that is running: ``compress``.
        path: module path of the block, such as ``model.layers.7``.
        index: place of the block among all, from 0.
        total: number of blocks.
    """


@hookspec
def emloc_stage_done(stage: str, output: "Path", manifest: "dict[str, Any]") -> None:
    """Observe that a stage's output is there, newly made or found finished. The Python API does not call it.

    Args:
        stage: the command: ``import``, ``compress``, ``cut``, ``train``, ``correct``, ``merge`` or ``eval``.
        output: the finished directory.
        manifest: the content of its ``emloc.json``.
    """
