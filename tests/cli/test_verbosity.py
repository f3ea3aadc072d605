"""Off a terminal progress is plain lines; --quiet leaves the output's path, and --verbose says everything."""

import os
import sys

import pytest

from emloc_core.cli.console import progress, working
from emloc_core.cli.verbosity import VARIABLE, Verbosity, verbosity
from emloc_core.errors import EmlocError
from emloc_core.requests import make_request
from emloc_core.settings import TrainSettings


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances a second with every reading."""
    seconds = iter(range(1000))
    monkeypatch.setattr("emloc_core.cli.console.time.monotonic", lambda: float(next(seconds)))


@pytest.mark.usefixtures("clock")
def test_lines_are_few_and_tell_the_time_left(capsys):
    with progress("Compressing", every=4) as advance:
        for index in range(1, 11):
            advance(f"block {index}", index, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Compressing: 4 of 10 (block 4), 4.0 s, about 6.0 s left",
        "Compressing: 8 of 10 (block 8), 8.0 s, about 2.0 s left",
        "Compressing: 10 of 10 (block 10), 10 s",
    ]


@pytest.mark.usefixtures("clock")
def test_the_time_left_of_a_resumed_run_counts_what_it_did_itself(capsys):
    with progress("Training", every=2) as advance:
        advance("loss 1.0", 91, 100)
        advance("loss 1.0", 92, 100)
    assert capsys.readouterr().err == "Training: 92 of 100 (loss 1.0), 2.0 s, about 8.0 s left\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_what_nobody_knows_the_length_of_is_shown_on_a_terminal(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    with working("Planning"):
        pass
    shown = capsys.readouterr()
    assert ("Planning ..." in shown.err) == terminal
    assert not shown.out


def test_training_says_its_steps_and_losses(emloc, tiny_model, rows_file, tmp_path):
    argv = ("train", tiny_model, "--data", rows_file, "-o", tmp_path / "a", "--steps", 3, "--batch-size", 2)
    code, out, err = emloc(*argv, "--logging-steps", 1, "-v")
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("Training: ")]
    assert [line.partition(" (")[0] for line in lines] == ["Training: 1 of 3", "Training: 2 of 3", "Training: 3 of 3"]
    assert "(loss " in lines[-1]
    assert "it/s" not in err
    assert verbosity() is Verbosity.NORMAL
    assert VARIABLE not in os.environ
    code, out, err = emloc(*argv, "--logging-steps", 1, "--quiet")
    assert (code, out) == (0, f"{tmp_path / 'a'}\n")
    assert "Training" not in err


@pytest.mark.parametrize("targets", ["q_proj,v_proj", ["q_proj, v_proj"], ["q_proj", "v_proj"]])
def test_targets_may_have_commas(targets):
    assert TrainSettings(target_modules=targets).target_modules == ["q_proj", "v_proj"]


def test_all_linear_is_every_linear_but_the_output_layer(emloc, tiny_model, rows_file, tmp_path):
    argv = ("train", tiny_model, "--data", rows_file, "-o", tmp_path / "a", "--dry-run", "--target")
    everything = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert f"LoRA on {everything}\n" in emloc(*argv, "all-linear")[1]
    output = emloc(*argv, "v_proj,q_proj", "--lr", 3e-4, "--steps", 7)[1]
    assert "7 steps at a learning rate of 0.0003; LoRA on q_proj, v_proj\n" in output
    with pytest.raises(EmlocError, match="all-linear cannot be combined"):
        make_request("train", {"target_modules": "all-linear,q_proj"}, model="m", data="d", output="o")
