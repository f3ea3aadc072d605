"""Linears of one name in two towers are two kinds to a person."""

import json

from emloc_core.cli.stage import _planned, summary
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.output import TIMING
from emloc_core.requests import make_request
from emloc_core.stages.result import Result

TOWERS = ["model.vision_tower.encoder.layer", "model.language_model.layers"]


def test_the_summary_of_compress_averages_no_two_towers(tmp_path):
    errors = dict(zip(TOWERS, ((0.125, 0.375), (0.5, None)), strict=True))
    linears = [
        {"path": f"{tower}.{block}.attention.q_proj", "relative_error": error}
        for tower, values in errors.items()
        for block, error in enumerate(values)
    ]
    result = {"linears": linears, "bytes": {"base": 2000, "emulator": 1000}}
    (tmp_path / MANIFEST).write_text(json.dumps({"request": {"settings": {}}, "result": result}))
    request = make_request("compress", model="model", data="rows.jsonl", output=tmp_path)
    assert [line.split() for line in summary(request, Result(tmp_path))[1:-1]] == [
        ["vision_tower", "q_proj", "0.250", "0.375"],
        ["language_model", "q_proj", "0.500", "0.500"],
    ]


def test_one_row_and_one_step_are_singular(tmp_path):
    request = make_request("train", model="model", data="rows.jsonl", output=tmp_path)
    planned = {
        **dict.fromkeys(("rows", "eval_rows", "steps", "cut_rows"), 1),
        **dict.fromkeys(("excluded_rows", "duplicate_rows", "dropped_rows", "model_bytes", "longest_tokens"), 0),
        **{"model": "m", "family": "f", "longest_row": "Row 1", "learning_rate": 0.1, "target_modules": ["q_proj"]},
    }
    lines = "\n".join(_planned("train", planned))
    assert "1 row to evaluate" in lines
    assert "maximum length: 1 row, 0 of them" in lines
    assert "1 step at a learning rate" in lines
    result = {"steps": 1, "rows": 1, "excluded_rows": 0, "train_loss": 1, "trainable_parameters": 8, "dropped_rows": 1}
    result |= {"best_step": 1, "eval_loss": 1, "eval_rows": 1}
    (tmp_path / MANIFEST).write_text(json.dumps({"request": {}, "result": result}))
    (tmp_path / TIMING).write_text("{}")
    first, second, third = summary(request, Result(tmp_path))
    assert first.startswith("1 step on 1 row (0 left out)")
    assert second.endswith("on 1 held-out row")
    assert third.startswith("1 row dropped")
