"""Sizes and counts as people write them."""

import pytest

from emloc_core.errors import EmlocError
from emloc_core.units import counted, parse_bytes


def test_a_number_without_a_unit_is_bytes_unless_it_can_only_be_a_slip():
    assert parse_bytes("24GiB") == 24 << 30
    assert parse_bytes("25769803776") == 24 << 30
    with pytest.raises(EmlocError, match="24GiB"):
        parse_bytes("24")


def test_one_is_singular():
    assert [counted(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
