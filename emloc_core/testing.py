"""Tests for plugins: a conformance kit for families and formats, and a pytest plugin that emloc installs.

Three lines in a test file check everything that a declaration promises, one test per tiny config and check::

    from emloc_core.testing import conformance_tests
    from emloc_mine import MINE

    test_mine = conformance_tests(MINE)

A failed test says what is wrong and how to fix it. ``pytest -k input-groups`` runs one check, ``-k MODEL_TYPE`` one
model. Importing this module does not import torch, since pytest loads it in every session.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from emloc_core.conformance import CheckResult, check_family, check_format
from emloc_core.family import Family

if TYPE_CHECKING:
    from emloc_core.conformance.check import Check, Subject

__all__ = ["CheckResult", "check_family", "check_format", "conformance_tests"]


def conformance_tests(family: Family) -> Callable[..., None]:
    """Return a test function for pytest: one test per tiny config of the family and check.

    Args:
        family: the plugin's declaration. It need not be installed; families nested in it must be.
    """
    from emloc_core.conformance.checks import cases

    parameters = [pytest.param(index, check, id=f"{label}-{check.name}") for index, label, check in cases(family)]

    @pytest.mark.parametrize(("index", "check"), parameters)
    def test(index: int, check: "Check", emloc_subjects: Callable[[Family, int], "Subject"]) -> None:
        result = check.on(emloc_subjects(family, index))
        if not result.passed:
            pytest.fail(f"{result}\n{result.traceback}".rstrip(), pytrace=False)

    return test


@pytest.fixture(scope="session")
def emloc_subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Family, int], Any]]:
    """Return a function that makes the tiny model to run a family's checks on; consecutive tests share one."""
    last: list[Any] = [None, None, None]

    def subject(family: Family, index: int) -> Any:
        from emloc_core.conformance.checks import make_subject

        if last[0] is not family or last[1] != index:
            directory: Path = tmp_path_factory.mktemp(f"emloc-{family.name}")
            last[:] = family, index, make_subject(family, index, directory)
        return last[2]

    yield subject
    last.clear()
