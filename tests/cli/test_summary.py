"""Linears of one name in two towers are two kinds to a person."""

import json

from emloc_core.cli.stage import summary
from emloc_core.files.manifest import MANIFEST
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
