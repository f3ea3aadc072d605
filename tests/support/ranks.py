"""Ranks of a model's Linears, for tests of what is done with them."""

from typing import Any

from emloc_core.emulator.declared import find_linears
from emloc_core.emulator.ranks import RankPlan, allocated
from emloc_core.family import Family


def plan_ranks(model: Any, family: Family, ratio: float) -> RankPlan:
    """Return what a family declares of a model, with uniform ranks of this ratio."""
    return allocated(find_linears(model, family), ratio)
