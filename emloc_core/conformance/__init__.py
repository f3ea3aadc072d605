"""The conformance kit: checks a family's declaration on its own tiny models.

Checks go through the stages that users run, on files in a temporary directory. From a test, use
:mod:`emloc_core.testing`; from the command line, ``emloc families check NAME``.
"""

import tempfile
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from emloc_core.conformance.check import Check, CheckResult
from emloc_core.family import Family

#: Called with the last check, the number of checks done, and the total.
Progress = Callable[[str, int, int], None]


def check_family(family: Family, progress: Progress = lambda *_: None) -> list[CheckResult]:
    """Run every check on the declaration, and on each of its tiny models.

    Args:
        family: as a plugin declares it; it need not be installed. Families nested in it must be.
        progress: called after every check.

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


__all__ = ["Check", "CheckResult", "Progress", "check_family"]
