"""Built-in commands and algorithms, provided through the same hooks as those of plugins."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
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


#: The built-in algorithms by their hook: a name can be checked without torch, and is resolved when it is asked for.
#: They are named, not imported, because they are in higher layers.
ALGORITHMS = {
    "emulators": {
        "low-rank": "emloc_core.standins:LowRank",
        "nf4": "emloc_core.standins:NF4",
        "low-rank-nf4": "emloc_core.standins:FourBitLowRank",
        "low-rank-2-bit": "emloc_core.standins:TwoBitLowRank",
        "trellis": "emloc_core.standins:Trellis",
    },
    "corrections": {"emloc": "emloc_core.algorithms.correction:correct_lora"},
    "objectives": {"tokens": "emloc_core.tokens:TokenObjective"},
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


def _resolved(hook: str) -> dict[str, Callable[..., Any]]:
    return {name: resolve_name(place) for name, place in ALGORITHMS[hook].items()}


@hookimpl
def emloc_emulators() -> dict[str, Callable[..., Any]]:
    """Provide factors as in the paper, in four and in two bits, and weights in four bits and in a trellis code."""
    return _resolved("emulators")


@hookimpl
def emloc_corrections() -> dict[str, Callable[..., Any]]:
    """Provide the paper's correction."""
    return _resolved("corrections")


@hookimpl
def emloc_objectives() -> dict[str, Callable[..., Any]]:
    """Provide tokens."""
    return _resolved("objectives")
