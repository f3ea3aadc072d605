"""Guards every use of a library's private parts: where one is gone, a sentence says what to install."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any
from unittest import mock

from emloc_core.compat.tested import TESTED
from emloc_core.errors import EmlocError, first_line


@contextmanager
def private(library: str) -> Iterator[None]:
    """Import or read private parts of a library in the block.

    Raises:
        EmlocError: it does not have them.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        tested, use = TESTED[library]
        raise EmlocError(
            f"{library} {version(library)} is not as EMLoC needs it for {use} ({first_line(error)}).",
            f"Install {library} {tested}.",
            code="unavailable",
        ) from error


@contextmanager
def patched(library: str, module: str, **replacements: Any) -> Iterator[None]:
    """Replace a module's attributes, by name, while the context is active.

    Raises:
        EmlocError: the library has no such module or objects.
    """
    with ExitStack() as stack:
        with private(library):
            for name, replacement in replacements.items():
                stack.enter_context(mock.patch(f"{module}.{name}", replacement))
        yield
