"""The cells of ``benchmarks/quality.py``: what a share of the memory means for each kind of stand-in."""

from dataclasses import replace

import pytest
from quality_cells import ATTENTION, BYTES, GEMMA, VARIANTS, Cell, cells, wider_cells


@pytest.mark.parametrize(
    ("kind", "memory", "ratio"),
    [
        ("low-rank", 0.28, 0.28),
        ("low-rank-paper", 0.28, 0.28),
        ("low-rank-nf4", 0.18, 0.64),  # 4.5 bits per number instead of 16
        ("low-rank-2-bit", 0.07, 0.539),
        ("nf4", 0.28, None),
        ("full", 1, None),
    ],
)
def test_a_ratio_takes_the_memory_that_is_asked_for(kind, memory, ratio):
    assert Cell("arithmetic", kind, memory, 0, 60, 2e-3).ratio == ratio


def test_no_cell_is_listed_twice_and_every_variant_is_measured():
    listed = [*cells(3, []), *wider_cells()]
    assert len({cell.name for cell in listed}) == len(listed)
    assert {cell.kind for cell in listed} >= set(VARIANTS) | set(BYTES)


def test_a_name_tells_what_leaves_the_usual_set_up():
    usual = Cell("arithmetic", "nf4", 0.28, 0, 60, 2e-3)
    assert usual.name == "arithmetic-nf4-0.28-0-60-0.002"
    other = replace(usual, model=GEMMA, batch=2, rank=64, targets=ATTENTION)
    assert other.name == "arithmetic-nf4-0.28-0-60-0.002-gemma-3-270m-batch2-rank64-attention"


def test_a_measurement_gives_its_cell_whatever_it_leaves_out():
    usual = Cell("arithmetic", "nf4", 0.28, 0, 60, 2e-3)
    assert set(usual.values) == {"task", "kind", "memory", "seed", "steps", "learning_rate"}
    for cell in (usual, replace(usual, rank=64)):
        assert Cell.from_row({**cell.values, "systems": {}}) == cell


def test_no_usual_cell_is_wider():
    assert not any(cell.is_wider for cell in cells(3, []))
    assert all(cell.is_wider for cell in wider_cells())
