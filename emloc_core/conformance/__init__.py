"""The conformance kit: checks a family's declaration on its own tiny models, and formats of emulator on one of them.

Checks go through the stages that users run, on files in a temporary directory. From a test, use
:mod:`emloc_core.testing`; from the command line, ``emloc families check NAME``.
"""

import tempfile
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from emloc_core.conformance.check import Check, CheckResult
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.files.job import Progress

if TYPE_CHECKING:
    from emloc_core.standins import Format


def check_family(family: Family, progress: Progress = lambda *_: None) -> list[CheckResult]:
    """Run every check on the declaration, and on each of its tiny models.

    Args:
        family: as a plugin declares it; it need not be installed. Families nested in it must be.

    Returns:
        One result per check and model, starting with those of the declaration. Failed checks raise nothing.
    """
    from emloc_core.conformance.checks import cases, make_subject

    planned = cases(family)
    results: list[CheckResult] = []
    with tempfile.TemporaryDirectory(prefix="emloc-check-") as directory:
        for index, group in groupby(planned, key=itemgetter(0)):
            subject = make_subject(family, index, Path(directory))
            for _, label, check in group:
                results.append(check.on(subject))
                progress(f"{label} {check.name}", len(results), len(planned))
    return results


def check_format(format: "Format") -> list[CheckResult]:
    """Run every check on a format of emulator: on random weights, and through the stages on a tiny text model.

    Args:
        format: as a plugin provides it; it need not be installed.

    Returns:
        One result per check. Failed checks raise nothing.

    Raises:
        EmlocError: no installed family has a tiny text model.
    """
    from emloc_core.conformance.formats import CHECKS, TinyEmulator, offered
    from emloc_core.plugins.manager import plugin_manager

    families = (family for family in plugin_manager().families() if family.modality == "text" and family.tiny_configs)
    if (family := next(families, None)) is None:
        raise EmlocError(
            "No installed family has a tiny text model to check a format on.", "Install a plugin with one."
        )
    with tempfile.TemporaryDirectory(prefix="emloc-check-") as directory, offered(format):
        subject = TinyEmulator(format, family, family.tiny_configs[0], Path(directory))
        return [check.on(subject) for check in CHECKS]


__all__ = ["Check", "CheckResult", "check_family", "check_format"]
