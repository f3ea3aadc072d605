"""Built-in commands and algorithms, provided through the same hooks as those of plugins.

Each function imports its algorithm when it is called: algorithms need torch, but the command line's help does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from emloc_core.errors import EmlocError, typed_line
from emloc_core.hookspecs import hookimpl

#: The built-in commands: modules of ``emloc_core.cli``, each with a ``command`` (``import_`` for import).
COMMANDS = (
    "chat",
    "compress",
    "correct",
    "doctor",
    "eval",
    "export",
    "families",
    "import",
    "merge",
    "plan",
    "polish",
    "push",
    "report",
    "run",
    "train",
    "tune",
    "zoo",
)


#: The built-in algorithms by their hook, so that a name can be checked without torch.
ALGORITHMS = {
    "emulators": ("low-rank", "nf4", "low-rank-nf4", "low-rank-2-bit", "trellis"),
    "corrections": ("emloc",),
    "objectives": ("tokens",),
}


@contextmanager
def naming_errors(label: str) -> Iterator[None]:
    """Name the algorithm, which may be a plugin's, in errors that it raises within the context.

    Raises:
        EmlocError: replaces any other exception. An unfinished output is kept: memory may have run out.
    """
    try:
        yield
    except EmlocError:
        raise
    except Exception as error:
        raise EmlocError(
            f"{label} failed ({typed_line(error)}).",
            "If memory ran out, free some and the same command resumes; otherwise choose another or update its plugin.",
            code="plugin",
            resumable=True,
        ) from error


@hookimpl
def emloc_emulators() -> dict[str, Callable[..., Any]]:
    """Provide factors as in the paper, in four and in two bits, and weights in four bits and in a trellis code."""
    from emloc_core import standins

    factors = (standins.LowRank, standins.FourBitLowRank, standins.TwoBitLowRank)
    return {format.name: format for format in (*factors, standins.NF4, standins.Trellis)}


@hookimpl
def emloc_corrections() -> dict[str, Callable[..., Any]]:
    """Provide the paper's correction."""
    from emloc_core.algorithms.correction import correct_lora

    return {"emloc": correct_lora}


@hookimpl
def emloc_objectives() -> dict[str, Callable[..., Any]]:
    """Provide tokens; imported by name, because that module is in a higher layer."""
    return {"tokens": import_module("emloc_core.tokens").TokenObjective}
