"""The versions that are promised are those that were tested."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version
from support.paths import ROOT

from emloc_core.compat.tested import TESTED


def ranges() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {requirement.name: requirement for text in project["dependencies"] for requirement in [Requirement(text)]}


def bound(requirement: Requirement, operator: str) -> str | None:
    return next((clause.version for clause in requirement.specifier if clause.operator == operator), None)


def test_a_range_ends_with_the_version_after_the_newest_that_was_tested():
    after = {
        name: ".".join(map(str, [*Version(tested).release[:-1], Version(tested).release[-1] + 1]))
        for name, (tested, _) in TESTED.items()
    }
    ends = {name: end for name, requirement in ranges().items() if (end := bound(requirement, "<"))}
    assert ends == {name: after[name] for name in ends}


def test_a_version_that_was_tested_is_in_its_range():
    wanted = ranges()
    assert not [name for name, (tested, _) in TESTED.items() if not wanted[name].specifier.contains(tested)]


def test_every_range_begins_and_no_version_is_the_only_one():
    assert not [
        str(requirement)
        for requirement in ranges().values()
        if bound(requirement, ">=") is None or bound(requirement, "==")
    ]


def test_libraries_with_private_parts_are_those_that_are_tested():
    sources = [path.read_text() for path in (ROOT / "emloc_core" / "compat").glob("*.py")]
    used = {name for source in sources for name in re.findall(r'(?:private|patched)\("([\w-]+)"', source)}
    assert used == TESTED.keys()
