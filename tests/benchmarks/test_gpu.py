"""The benchmark of a GPU runs, on shapes too small to say anything."""

import pytest
from gpu import SECTIONS, run


@pytest.mark.thorough
@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_gives_rows(section):
    rows = run(section, small=True)["rows"]
    assert rows
    assert all(row.keys() == rows[0].keys() for row in rows)
