"""Linears of one name in two towers are two kinds to a person."""

import json

from emloc_core.cli.stage import summary
from emloc_core.files.manifest import MANIFEST
from emloc_core.report.towers import short_names, split_path
from emloc_core.requests import make_request
from emloc_core.stages.result import Result

TOWERS = ["model.vision_tower.encoder.layer", "model.language_model.layers"]


def test_a_path_says_tower_block_and_kind():
    assert split_path("model.layers.3.mlp.experts.7.down_proj") == ("model.layers", 3, "down_proj")
    assert split_path("model.projector.linear_1") == ("", None, "linear_1")


def test_towers_are_called_by_what_tells_them_apart():
    assert list(short_names(TOWERS).values()) == ["vision_tower", "language_model"]
    assert list(short_names(["model.layers"]).values()) == [""]


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
