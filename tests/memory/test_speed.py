"""The estimate of a step's time: what overlaps, and what is not known."""

import os
from pathlib import Path

import pytest
import torch

from emloc_core.memory import speed
from emloc_core.memory.speed import Speed, measure


def test_reading_and_arithmetic_overlap() -> None:
    machine = Speed(flops=100.0, read=10.0)
    assert machine.seconds(500.0, 0) == 5
    assert machine.seconds(500.0, 20) == 5
    assert machine.seconds(500.0, 200) == 20
    assert Speed(100.0, None).seconds(500.0, 0) == 5
    assert Speed(100.0, None).seconds(500.0, 1) is None


def test_this_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(10_000_000))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.safetensors").touch()
    os.mkfifo(tmp_path / "empty" / "pipe.safetensors")  # nobody will ever write to it
    measured, without = measure("cpu", tmp_path), measure("cpu", tmp_path / "empty")
    assert measured is not None
    assert without is not None
    assert measured.read is not None
    assert measured.read > 0
    assert without.read is None
    assert min(measured.flops, without.flops) > 0
    monkeypatch.setattr(speed, "free_memory", lambda _: 1)
    beyond_memory = measure("cpu", tmp_path)
    assert beyond_memory is not None
    assert beyond_memory.read is not None
    assert beyond_memory.read > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_not_measured() -> None:
    assert measure("cuda", Path()) is None
