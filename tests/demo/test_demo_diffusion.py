"""The demo of pictures: its digits, and the whole of it with a base that has learned nothing."""

import json

import numpy
import pytest
from click.testing import CliRunner
from emloc_demo.diffusion import command, digits, judging, pretraining, style
from PIL import Image


def test_the_slant_moves_upper_rows_to_the_right_and_lower_ones_to_the_left():
    upright = numpy.zeros((1, 8, 8))
    upright[0, :, 3:5] = 1
    slanted = digits.slanted(upright)[0]
    centres = (slanted * numpy.arange(8)).sum(1) / slanted.sum(1)
    assert (numpy.diff(centres) < 0).all()
    assert centres.mean() == pytest.approx(3.5)


def test_the_judge_reads_digits_that_it_has_not_seen_in_both_styles():
    for digit in range(10):
        pictures = digits.of_digit(digit, 20)
        for more, those in ((0, pictures), (10, digits.slanted(pictures))):
            assert (digits.judge().predict(those.reshape(len(those), -1)) == digit + more).mean() > 0.7


@pytest.mark.thorough
def test_the_demo_scores_every_system_and_draws_it(tmp_path, monkeypatch):
    for settings in (command.TUNED, command.POLISHED):
        monkeypatch.setitem(settings, "steps", 1)
        monkeypatch.setitem(settings, "batch_size", 2)
    for module in (style, judging):
        monkeypatch.setattr(module, "SOLVER_STEPS", 2)
    for number in ("_TAUGHT", "_TESTED", "_PRIOR"):
        monkeypatch.setattr(style, number, 1)
    monkeypatch.setattr(command, "EMULATORS", {"low-rank": {"kind": "low-rank", "ratio": 0.5, "samples": 2}})
    monkeypatch.setattr(judging, "_EACH", 1)
    pretraining.pretrain(tmp_path / "base", steps=2)
    done = CliRunner().invoke(command.command, ["-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    systems = json.loads((tmp_path / "results.json").read_text())["systems"]
    assert list(systems) == [
        *("base", "LoRA on the base", "low-rank, corrected", "low-rank, and 40 exact steps", "40 exact steps alone")
    ]
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert sheet.height > 5 * 48
