"""The plugin contract. A plugin is a module in the entry-point group ``emloc`` with functions marked ``@hookimpl``.

Hooks may gain arguments but never lose them; ``API_VERSION`` counts the changes that plugin authors need to know about.
"""

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import click

    from emloc_core.family import Family
    from emloc_core.layout import Gguf, Layout
    from emloc_core.objective import Objective

API_VERSION = 5

hookspec = pluggy.HookspecMarker("emloc")
hookimpl = pluggy.HookimplMarker("emloc")


@hookspec
def emloc_families() -> "Sequence[Family]":  # type: ignore[empty-body]
    """Declare model families. Called when the plugin is loaded: import nothing heavy.

    Returns:
        The families. Their names and model types are unique among all plugins.
    """


@hookspec
def emloc_layouts() -> "Sequence[Layout]":  # type: ignore[empty-body]
    """Declare checkpoint layouts that ``emloc import`` converts to native ones. Called when the plugin is loaded.

    Returns:
        The layouts, as ``emloc_core.layout.Layout``. Their names and the model types that they read are unique among
        all plugins, and no family declares those model types.
    """


@hookspec
def emloc_gguf() -> "Sequence[Gguf]":  # type: ignore[empty-body]
    """Declare how text models are written for llama.cpp, by ``emloc export --gguf``. Called when one is written.

    Returns:
        Declarations, as ``emloc_core.layout.Gguf``; the first that names a model type is taken.
    """


@hookspec
def emloc_emulators() -> "dict[str, Callable[..., Any]]":  # type: ignore[empty-body]
    """Provide kinds of emulator, selected by ``--kind`` of ``compress``. Called when one is needed.

    Returns:
        By name, subclasses of ``emloc_core.standins.Format``: how the stand-in for a weight is made, stored, read back
        by transformers and by ``correct``, and how many bytes it takes. A format whose stand-ins are factors may bring
        its own ``factorize``, like :func:`emloc_core.algorithms.factorize.factorize`.

    Example:
        ```python
        from emloc_core.hookspecs import hookimpl


        @hookimpl
        def emloc_emulators():
            from emloc_core.standins import LowRank

            # Factors rounded to multiples of 2^-8; stored and loaded as those of the kind low-rank.
            class Coarse(LowRank):
                name = "coarse"

                def pack(self, fitted, dtype):
                    parts = super().pack(fitted, dtype)
                    return {key: (part * 256).round() / 256 for key, part in parts.items()}

            return {"coarse": Coarse}  # emloc compress --kind coarse
        ```
    """


@hookspec
def emloc_corrections() -> "dict[str, Callable[..., Any]]":  # type: ignore[empty-body]
    """Provide corrections of a LoRA, selected by ``--correction``. Called when one is needed.

    Returns:
        By name, ``f(weight, emulated, lora, clamps) -> loras``, like
        ``emloc_core.algorithms.correction.correct_lora``. ``weight`` is the base's, (m, n), ``emulated`` is its
        ``emloc_core.standins.StandIn``, ``lora`` is an ``emloc_core.algorithms.Lora``, ``clamps`` are the limits of the
        correction (0: ``lora`` unchanged; None: no limit), and ``loras`` has one Lora per clamp.

    Example:
        ```python
        from emloc_core.hookspecs import hookimpl


        # Make the LoRA smaller where the emulator is further from the base.
        def shrinking(weight, emulated, lora, clamps):
            from emloc_core.algorithms import Lora

            apart = float((weight - emulated.weight()).norm() / weight.norm())
            limits = [3 if clamp is None else clamp for clamp in clamps]
            return [Lora(lora.a, lora.b / (1 + limit * apart), lora.scale) for limit in limits]


        @hookimpl
        def emloc_corrections():
            return {"shrinking": shrinking}  # emloc correct --correction shrinking
        ```
    """


@hookspec
def emloc_objectives() -> "dict[str, Callable[[], Objective]]":  # type: ignore[empty-body]
    """Provide what models learn, other than tokens. Called when the plugin is loaded: import nothing heavy.

    Returns:
        By the name that families give in ``objective``: classes of :class:`emloc_core.objective.Objective`.
    """


@hookspec
def emloc_commands() -> "Sequence[click.Command]":  # type: ignore[empty-body]
    """Add commands to ``emloc``. Called when the plugin is loaded, even for ``emloc --help``: import nothing heavy.

    Returns:
        Click commands, with names that are not taken.
    """


@hookspec
def emloc_registry() -> "Sequence[Path]":  # type: ignore[empty-body]
    """Add registry entries: models that can be planned and converted by name. Called when entries are needed.

    Returns:
        Paths of entries (TOML files, see ``emloc_core.registry.entry.Entry``) or of directories of entries. Ids are
        unique among all plugins.
    """


@hookspec
def emloc_block_done(stage: str, path: str, index: int, total: int) -> None:
    """Observe that a stage has finished a block.

    Args:
        stage: the stage that is running: ``compress``.
        path: module path of the block, such as ``model.layers.7``.
        index: index of the block, from 0.
        total: number of blocks.
    """


@hookspec
def emloc_stage_done(stage: str, output: "Path", manifest: "dict[str, Any]") -> None:
    """Observe that a stage's output is finished, now or by an earlier run.

    Args:
        stage: the stage: ``import``, ``compress``, ``train``, ``correct``, ``polish``, ``merge``, ``export``
            or ``eval``.
        output: the finished directory.
        manifest: the content of its ``emloc.json``.
    """
