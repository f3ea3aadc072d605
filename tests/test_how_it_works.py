"""The walk through the code names files that exist, few enough to be read in an evening, and what is in them."""

import re

from support.paths import ROOT

PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
FILES = re.findall(r"^## \d+\. .*: `([\w/]+\.py)`$", PAGE, re.MULTILINE)


def test_it_is_read_in_an_evening():
    lines = sum(len((ROOT / "emloc_core" / file).read_text(encoding="utf-8").splitlines()) for file in FILES)
    assert len(FILES) == 10
    assert lines <= 2500


def test_what_it_names_is_there():
    for section in PAGE.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        code = (ROOT / "emloc_core" / title.split("`")[1]).read_text(encoding="utf-8")
        names = re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", text)
        missing = [name for name in names if not re.search(rf"\b{name.split('.')[-1]}\b", code)]
        assert names, title
        assert not missing, (title, missing)
