"""What ``benchmarks/quality.py`` says of other models, lengths, ranks and places of the LoRA."""

import pytest
from quality_cells import FULL
from quality_table import Table
from quality_wider import wider_rows


def loss(*losses):
    return {"nll": sum(losses) / len(losses), "losses": " ".join(map(str, losses))}


def cell(kind, memory, systems, steps=240, **other):
    return {"task": "arithmetic", "kind": kind, "memory": memory, "base": "a", "seed": 0, "steps": steps,
            "learning_rate": 2e-3, "systems": systems, **other}  # fmt: skip


def control(full, steps=240, **other):
    return cell(FULL, 1, {"base": loss(9.0, 9.0), FULL: loss(full, full)}, steps, **other)


def emulated(steps=240, **other):
    systems = {"uncorrected": loss(3.0, 4.0), "auto": loss(2.0, 4.0)}
    return cell("nf4", 0.28, systems, steps, **other)


def test_each_cell_is_compared_with_a_lora_of_its_own_steps_batch_rank_place_and_scaling():
    rows = [
        control(1.0),
        control(5.0, rank=64),
        control(6.0, targets="attention"),
        control(7.0, steps=60),
        control(4.0, batch=2),
        control(3.0, scaling="rslora"),
    ]
    rows += [emulated(), emulated(rank=64), emulated(targets="attention"), emulated(steps=60), emulated(batch=2),
             emulated(scaling="rslora")]  # fmt: skip
    keys = ("steps", "batch", "rank", "targets", "scaling")
    recoveries = {tuple(row[key] for key in keys): row["auto"] for row in wider_rows(Table(rows))}
    assert recoveries == {
        (240, 8, 8, "all", "plain"): 6 / 8, (240, 8, 64, "all", "plain"): 6 / 4,
        (240, 8, 8, "attention", "plain"): 6 / 3, (60, 8, 8, "all", "plain"): 6 / 2,
        (240, 2, 8, "all", "plain"): 6 / 5, (240, 8, 8, "all", "rslora"): 6 / 6,
    }  # fmt: skip


def test_the_interval_is_of_differences_between_the_same_rows():
    (comparison,) = wider_rows(Table([control(1.0), emulated()]))
    assert comparison["reach"] == pytest.approx(1.96 * 1.0 / 8, abs=1e-4)  # 1 and 3 behind, of 8 that there are to gain


def test_a_cell_without_its_control_is_left_out():
    assert wider_rows(Table([control(1.0), emulated(rank=64)])) == []


def test_exact_steps_after_long_tuning_are_compared_with_those_of_the_usual_lora():
    (usual, own), steps = (control(2.0), emulated()), {"polish20": loss(1.5, 1.5)}
    own["systems"] |= steps
    assert wider_rows(Table([usual, own]))[0]["polish20"] is None
    usual["systems"]["polish20"] = loss(1.0, 1.0)
    assert wider_rows(Table([usual, own]))[0]["polish20"] == 7.5 / 8
