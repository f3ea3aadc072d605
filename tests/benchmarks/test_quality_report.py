"""The report of ``benchmarks/quality.py``: what is compared with what."""

import pytest
from quality_cells import FULL
from quality_report import Table, best_table, paired_rows, recovery_rows, variant_rows


def loss(*losses):
    """A system's losses of rows of one token each."""
    return {"nll": sum(losses) / len(losses), "losses": " ".join(map(str, losses))}


def cell(kind, memory, base, seed, systems, rate=1e-3, selection=1.0):
    """A measurement of pictures; where an emulator is made, ``auto`` chose nothing."""
    cell_key = {"task": "pictures", "kind": kind, "memory": memory, "base": base, "seed": seed, "steps": 60}
    chosen = {"clamp": 0, "scale": 1.0}
    candidates = [{**chosen, "nll": selection, "gain": 0.0}]
    own = {"selection": selection} if kind == FULL else {"chosen": chosen, "candidates": candidates}
    return {**cell_key, "learning_rate": rate, "systems": systems, **own}


def control(base="a", seed=0, alone=9.0, full=1.0, **other):
    return cell(FULL, 1, base, seed, {"base": loss(alone), FULL: loss(full)}, **other)


def emulated(kind, memory, *losses, base="a", seed=0, **other):
    measured = loss(*losses)
    return cell(kind, memory, base, seed, {"uncorrected": measured, "auto": measured}, **other)


def recovered(rows, system):
    return [row for row in recovery_rows(Table(rows)) if row["system"] == system]


def test_recovery_is_that_of_the_same_base_and_seed():
    rows = [control(), control("b", full=5.0), control(seed=1, full=3.0)]
    rows += [emulated("nf4", 0.28, 3.0), emulated("nf4", 0.28, 7.0, base="b"), emulated("nf4", 0.28, 6.0, seed=1)]
    (recovery,) = recovered(rows, "nf4+auto")
    assert recovery["runs"] == 3
    assert recovery["mean"] == pytest.approx((6 / 8 + 2 / 4 + 3 / 6) / 3, abs=1e-4)


def test_every_seed_has_the_rate_that_its_selection_rows_choose():
    rows = [control(), control(seed=1)]
    rows += [emulated("nf4", 0.28, 2.0, rate=1e-3, selection=0.5), emulated("nf4", 0.28, 1.0, rate=2e-3, selection=0.6)]
    rows += [emulated("nf4", 0.28, 8.0, seed=1, rate=1e-3, selection=0.9)]
    rows += [emulated("nf4", 0.28, 4.0, seed=1, rate=2e-3, selection=0.8)]
    (recovery,) = recovered(rows, "nf4+auto")
    assert recovery["mean"] == pytest.approx((7 / 8 + 5 / 8) / 2, abs=1e-4)


def test_a_way_that_loses_less_on_every_row_is_told():
    rows = [emulated("nf4", 0.28, 2.0, 3.0, 4.5), emulated("low-rank", 0.28, 1.0, 2.0, 3.0)]
    rows += [emulated("nf4", 0.28, 9.0, 9.0, 9.0, base="b")]  # the other was not measured on this base
    paired = {(row["memory"], row["other"]): row for row in paired_rows(Table(rows))}
    assert paired[0.28, "nf4+uncorrected"]["mean"] == 0
    better = paired[0.28, "low-rank+auto"]
    assert (better["runs"], better["mean"]) == (1, pytest.approx(3.5 / 3, abs=1e-4))
    assert 0 < better["low"] < better["mean"] < better["high"]


def test_with_exact_steps_ways_are_compared_that_began_with_moments():
    rows = [emulated("nf4", 0.28, 2.0, 3.0), emulated("low-rank", 0.28, 2.0, 3.0)]
    for row, losses in zip(rows, ((1.5, 1.5), (1.0, 0.5)), strict=True):
        row["systems"]["polish20"] = loss(*losses)
        row["exact_moments"] = True

    def polished():
        return [(row["other"], row["mean"]) for row in paired_rows(Table(rows)) if row["system"] == "emloc+polish20"]

    assert ("low-rank+polish20", 0.75) in polished()
    rows[1]["exact_moments"] = False
    assert polished() == []


def test_whether_auto_harms_is_judged_where_it_chose_as_it_does_now():
    harmed = emulated("nf4", 0.28, 1.0, 1.0)
    harmed["systems"]["auto"] = loss(2.0, 3.0)
    good = emulated("nf4", 0.28, 1.0, 1.0, seed=1)

    def harm():
        rows = paired_rows(Table([harmed, good]))
        return next((row["runs"], row["mean"]) for row in rows if row["other"] == "nf4+uncorrected")

    assert harm() == (2, 0.75)
    del harmed["candidates"][0]["gain"]  # as in older results
    assert harm() == (1, 0.0)


def test_variants_are_compared_at_the_same_rate():
    rows = [emulated("low-rank", 0.28, 4.0, 5.0, rate=1e-3), emulated("low-rank", 0.28, 1.0, 1.0, rate=2e-3)]
    rows += [emulated("low-rank-global", 0.28, 3.0, 3.0, rate=1e-3)]
    (variant,) = variant_rows(Table(rows))
    assert (variant["nll"], variant["default_nll"], variant["mean"]) == (3.0, 4.5, -1.5)


def test_bases_are_told_apart_where_there_are_several():
    rows = [control(), {**emulated("nf4", 0.28, 3.0), "share": 0.259}]
    assert "| pictures | `nf4` | 0.259 |" in best_table(Table(rows))
    table = best_table(Table([*rows, control("b")]))
    assert "| pictures, base a | `nf4` | 0.259 |" in table
    assert "| pictures, base b | the base itself, 60 steps |" in table


@pytest.mark.parametrize("moments", [True, False])
def test_exact_steps_without_moments_are_marked(moments):
    longer = control() | {"steps": 80}
    row = emulated("nf4", 0.28, 2.0) | {"exact_moments": moments}
    row["systems"]["polish20"] = loss(1.5)
    line = best_table(Table([control(), longer, row])).splitlines()[2]
    assert line.endswith("| 1.500 (0.938) |" if moments else "| 1.500 (0.938) ° |")
