"""Cases of a test that only `make test-all` runs."""

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(*cases: Any) -> list[Any]:
    """Return further cases of a property, one parameter set each; a tuple has the values of several parameters."""
    return [pytest.param(*_values(case), marks=pytest.mark.thorough) for case in cases]


def most_thorough(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Return all cases, of which those that are ``kept`` are run by `make test` too."""
    return [case if case in kept else thorough(case)[0] for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
