"""Contracts with other libraries: what EMLoC needs of them, that they do not promise."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest

from emloc_core.errors import EmlocError, first_line, typed_line


@contextmanager
def contract(library: str, dependent: str) -> Iterator[None]:
    """Fail, where the test fails, with one sentence: what has changed in a library, and what needs it."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, EmlocError) and error.__cause__ else error
        problem = first_line(cause) if isinstance(cause, AssertionError) else typed_line(cause)
        message = f"{library} {version(library)}: {problem}. emloc_core.{dependent} depends on it."
        raise pytest.fail.Exception(message, pytrace=False) from None
