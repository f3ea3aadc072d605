"""The cells of ``benchmarks/quality.py``: what a share of the memory means for each kind of stand-in."""

import pytest
from quality_cells import BYTES, GONE, VARIANTS, Cell, cells


@pytest.mark.parametrize(
    ("kind", "memory", "ratio", "arithmetic"),
    [
        ("low-rank", 0.28, 0.28, 0.28),
        ("low-rank-paper", 0.28, 0.28, 0.28),
        ("low-rank-nf4", 0.18, 0.64, 0.64),  # 4.5 bits a number instead of 16
        ("1.6-bit+repair", 0.17, 0.2311, 1.23),  # the factors come on top of the weight
        ("nf4", 0.28, None, 1),
        ("full", 1, None, 1),
    ],
)
def test_a_ratio_takes_the_memory_that_is_asked_for(kind, memory, ratio, arithmetic):
    cell = Cell("arithmetic", kind, memory, 0, 60, 2e-3)
    assert (cell.ratio, cell.arithmetic) == (ratio, arithmetic)


def test_no_cell_is_listed_twice_and_every_variant_is_measured():
    found = list(cells(3, []))
    assert len({cell.name for cell in found}) == len(found)
    assert {cell.kind for cell in found} >= (set(VARIANTS) | set(BYTES)) - {GONE}
