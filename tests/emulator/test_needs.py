"""The memory of stage 1 by formula, compared with the measured peak."""

from collections import namedtuple
from functools import partial

import pytest
import torch
from support.allocated import peak_of
from support.marks import most_thorough, thorough

from emloc_core.algorithms import statistics
from emloc_core.algorithms.products import by_onednn
from emloc_core.algorithms.statistics import Gram, cheaper_side
from emloc_core.emulator import propagation
from emloc_core.emulator.propagation import PairedMoments
from emloc_core.standins import costs, vocabulary
from emloc_core.standins.registry import format_named
from emloc_core.standins.vocabulary import PACKINGS

Planned = namedtuple("Planned", "out_features in_features rank tap group", defaults=[("together",)])

#: Outputs of the Linears of a group, and inputs.
DOWN, UP = ((96,), 384), ((320, 320), 96)
KINDS = ("nf4", "trellis", "low-rank", "low-rank-nf4", "low-rank-2-bit")


@pytest.fixture(autouse=True)
def as_of_wide_models(monkeypatch):
    """What is done to some rows or columns at a time would outweigh all else at widths that a test can take."""
    for module, name in (
        (statistics, "ROWS"),
        (propagation, "ROWS"),
        (costs, "ROWS"),
        (costs, "BLOCK"),
        (statistics, "BLOCK"),
    ):
        monkeypatch.setattr(module, name, 32)
    monkeypatch.setattr(vocabulary, "ROWS", 128)


def batches(size: int, *, wide: bool) -> list[torch.Tensor]:
    """Return inputs; if wide, a few directions of which dominate so that their Gram needs fp64."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    directions = draw(4, size) * 1e6
    return [draw(16, size) + (draw(16, 4) @ directions if wide else 0) for _ in range(40)]


def planned(format, group):
    outputs, n = group
    ratio = format.ratios and format.ratios.default
    ranks = [int(ratio * m * n / (m + n)) if ratio else None for m in outputs]
    return [Planned(m, n, k, format.tap(cheaper_side(m, n))) for m, k in zip(outputs, ranks, strict=True)]


def fit_propagated(format, linears, weights, inputs):
    moments = PairedMoments(weights, narrow=format.narrow)
    for x in inputs:
        moments.add(x, 1.01 * x)
    targets = moments.fit()
    if format.narrow:
        moments.emulator.narrow()
    shared = all(linear.tap == "input" for linear in linears)
    parts = [list(range(len(linears)))] if shared else [[index] for index in range(len(linears))]
    fitted = []
    for part in parts:
        part_targets = [targets[index] for index in part]
        gram = moments.gram_for(part_targets[0], linears[part[0]].tap)
        fitted += format.fit(part_targets, gram, [linears[index].rank for index in part])
    return fitted


def fit_to_base(format, linears, weights, inputs):
    (linear, *_) = linears
    output = linear.tap == "output"
    gram = Gram(linear.tap, linear.out_features if output else linear.in_features)
    for x in inputs:
        gram.add(x.to(weights[0]) @ weights[0].T if output else x)
    if format.narrow:
        gram.narrow()
    return format.fit(weights, gram, [linear.rank for linear in linears])


@pytest.mark.parametrize("wide", [*thorough(False), True], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", most_thorough(KINDS, "trellis", "low-rank-2-bit"))
@pytest.mark.parametrize(
    ("group", "fit"),
    [
        pytest.param(DOWN, fit_propagated, id="down"),
        pytest.param(UP, fit_propagated, id="up", marks=pytest.mark.thorough),
        pytest.param(DOWN, fit_to_base, id="down, base", marks=pytest.mark.thorough),
        pytest.param(UP, fit_to_base, id="up, base", marks=pytest.mark.thorough),
    ],
)
@by_onednn()
def test_fitting_takes_no_more_than_is_planned(kind, group, fit, wide):
    format = format_named(kind).own()
    linears = planned(format, group)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    weights = [(draw(m, group[1]) / 8).bfloat16() for m in group[0]]
    inputs = batches(group[1], wide=wide)
    options = {"propagated": fit is fit_propagated}
    need = max(phase.statistics for phase in format.phases(linears, torch.bfloat16, **options))
    peak = peak_of(lambda: fit(format, linears, weights, inputs))
    assert peak <= need
    if group is DOWN and fit is fit_propagated and wide:
        assert need <= 1.3 * peak


@pytest.mark.parametrize("wide", [*thorough(False), True], ids=["fp32", "fp64"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_the_vocabulary_takes_no_more_than_is_planned(packing, wide):
    rows, features = 600, 192
    weight, inputs = torch.randn(rows, features).bfloat16(), batches(features, wide=wide)

    def pack():
        if not PACKINGS[packing].fitted:
            return PACKINGS[packing].pack(weight)
        moments = PairedMoments([torch.eye(features)], narrow=True)
        for x in inputs:
            moments.add(x, 1.01 * x)
        (target,), gram = moments.fit(), moments.emulator
        return PACKINGS[packing].pack(weight, gram, target)

    need = PACKINGS[packing].packing_bytes(rows, features, weight.dtype)
    peak = peak_of(pack)
    assert peak <= need <= 1.5 * peak
