"""Cards: systems are told apart, and a stranger's manifest cannot break one's own output."""

import json

import pytest

from emloc_core.emulator.compress import described
from emloc_core.emulator.method import CompletedSettings
from emloc_core.files.card import CARD, card
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.output import Output

CORRECTED = {
    "kind": "corrected-adapter",
    "inputs": {"base": "organisation/model"},
    "request": {"correction": "paper"},
    "result": {
        "clamp": 0,
        "scale": 0.85,
        "candidates": [
            {"clamp": 0, "scale": 1.0, "nll": 1.25, "rows": 8},
            {"clamp": 0, "scale": 0.85, "nll": 1.125, "rows": 8},
        ],
    },
}


def test_candidates_are_told_apart_and_the_stage_says_what_it_did():
    text = card({**CORRECTED, "made": "Correction by `paper`:\nscale 0.85."}, [], "AutoModelForCausalLM")
    assert "| 0 | 1 | 1.2500 |" in text
    assert "| 0 | 0.85 | 1.1250 |" in text
    assert "- Correction by `paper`: scale 0.85.\n" in text


@pytest.mark.parametrize(("calibration", "wording"), [("none", "of the weights"), ("base", "on 64 calibration rows")])
def test_an_error_is_of_what_was_measured(calibration, wording):
    usual = {"samples": 64, "allocator": "uniform"}
    settings = CompletedSettings(kind="nf4", calibration=calibration, **usual)
    text = described(settings, {"linears": [{"relative_error": 0.25}], "bytes": {"base": 8, "emulator": 2}})
    assert ("relative error of the weights 0.250" in text) == (calibration == "none")
    assert wording in text


@pytest.mark.parametrize(
    "manifest",
    [
        {"kind": "emulator", "inputs": {"model": "PARENT"}},
        {"kind": "emulator"},
        {"kind": "emulator", "inputs": [], "request": {}, "result": {}},
        {"kind": "emulator", "inputs": {"model": 3}, "result": {"candidates": 1}},
        {"kind": "emulator", "inputs": {}, "made": 5},
        {"kind": "adapter", "inputs": {}, "made": {"LoRA": 1}, "result": {"candidates": [{}]}},
    ],
)
def test_a_strange_parent_is_left_out(manifest, tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / MANIFEST).write_text(json.dumps(manifest).replace("PARENT", str(parent)))
    output = Output(tmp_path / "out", "adapter", {}, inputs={"model": str(parent)})
    with output.build() as staging:
        (staging / "weights").write_text("x")
    assert "Made by EMLoC" in (tmp_path / "out" / CARD).read_text()
