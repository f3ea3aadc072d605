"""The commands that a plan prints do what it decided, in the memory that it says."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.marks import thorough
from support.rows import example_rows, write_jsonl

from emloc_core.files.documents import read_json
from emloc_core.files.meter import peak_memory
from emloc_core.memory.budget import Budget
from emloc_core.memory.decision import decide
from emloc_core.memory.workload import make_workload
from emloc_core.settings import TrainSettings

TRAIN = TrainSettings(batch_size=2, bf16=False)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_jsonl(tmp_path / "train.jsonl", example_rows()[:30])


def printed(emloc, model: Path, rows: Path, memory: int, *more: object) -> list[list[str]]:
    """Return the commands that a plan prints for a memory, all of it for tuning."""
    options = ("--data", rows, "--batch-size", 2, "--no-bf16", "--memory", memory, "--no-measure", "--length", 16)
    code, out, err = emloc("plan", model, *options, *more)
    assert code == 0, err
    return [shlex.split(line) for line in out.splitlines() if line.startswith("  emloc ")]


@pytest.mark.parametrize("kind", [*thorough("nf4", "trellis"), None])
def test_they_run_and_make_what_was_decided(kind: str | None, emloc, shallow_model: Path, rows: Path) -> None:
    commands = printed(emloc, shallow_model, rows, 2**32, "--headroom", 0, *(["--kind", kind] if kind else []))
    for command in commands:
        code, _, err = emloc(*command[1:])
        assert code == 0, f"{command}\n{err}"
    settings = {path.parent.name: read_json(path)["request"]["settings"] for path in Path().glob("*/emloc.json")
            if "settings" in read_json(path)["request"]}  # fmt: skip
    assert settings["adapter"]["batch_size"] * settings["adapter"]["accumulation"] == 2
    assert settings["adapter"]["max_length"] == 16
    if kind:
        assert settings["emulator"]["kind"] == kind
        assert ("polished" in settings) == (kind == "trellis")
    else:
        assert [command[1] for command in commands] == ["train"]
        assert settings["adapter"]["batch_size"] == 2


@pytest.mark.slow
def test_every_stage_stays_within_the_memory(emloc, shallow_model: Path, rows: Path) -> None:
    config = shallow_model / "config.json"
    ways = decide(config, make_workload(config, TRAIN, length=16, data=str(rows)), Budget(2**40)).ways
    emulator = next(way for way in ways if way.kind)
    memory = int(max(emulator.bytes, emulator.compress_bytes) / 0.95) + 1
    for command in printed(emloc, shallow_model, rows, memory, "--kind", emulator.kind):
        subprocess.run([sys.executable, "-m", "emloc_core", *command[1:]], check=True, capture_output=True)
    peaks = {path.parent.name: peak_memory(read_json(path)) for path in Path().glob("*/timing.json")}
    assert peaks.keys() == {"emulator", "adapter", "corrected"}
    assert max(peaks.values()) <= memory


def test_tuning_stays_within_the_memory(emloc, shallow_model: Path, rows: Path) -> None:
    config = shallow_model / "config.json"
    workload = make_workload(config, TRAIN, length=16, data=str(rows))
    needed = next(way.bytes for way in decide(config, workload, Budget(2**40)).ways if way.kind is None)
    memory = int(needed / 0.95) + 1
    (train,) = printed(emloc, config, rows, memory)
    done = subprocess.run([sys.executable, "-m", "emloc_core", *train[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert peak_memory(read_json(Path("adapter") / "timing.json")) <= memory
