"""Exact steps of two processes: the steps of one, resumed bit for bit, and an error of one ends both."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import contents
from support.jobs import exact_job
from support.killed import kill
from support.rows import example_rows, write_jsonl
from support.together import run_together

from emloc_core.errors import EmlocError
from emloc_core.exact.steps import ExactSteps
from emloc_core.files.documents import read_json
from emloc_core.files.output import Output
from emloc_core.requests import EvalRows
from emloc_core.settings import TrainSettings

#: An epoch of 19 rows has steps of eight, eight and three: in the last one the second process has one row. Then one
#: of 17 rows has a step of one, in which it has none.
ROWS = 19
SETTINGS = TrainSettings(
    epochs=2, learning_rate=0.02, batch_size=2, accumulation=2, lora_dropout=0.2, bf16=False, logging_steps=1,
    eval_steps=2,
)  # fmt: skip


def write_rows(path, count):
    """Rows of unlike lengths."""
    rows = [
        {**row, "completion": row["completion"] * (1 + index % 3)} for index, row in enumerate(example_rows()[:count])
    ]
    return write_jsonl(path, rows)


def train(model, rows, output, **changes):
    held_out = write_jsonl(output.with_name(f"held-out-{os.getpid()}.jsonl"), example_rows()[-5:])
    settings = SETTINGS.model_copy(update=changes)
    return exact_job(model, rows, output, settings, evaluation=EvalRows(data=str(held_out))).run()


def train_and_count(model, rows, output):
    """Train until the adapter is there, and write how often this process read each unit in every step."""
    take, publish, counts = ExactSteps.loss, Output._publish, []

    def loss(self, *args, **options):
        self.weights.reads.clear()
        value = take(self, *args, **options)
        counts.append(dict(self.weights.reads))
        return value

    def publish_late(self):
        time.sleep(1)
        publish(self)

    ExactSteps.loss, Output._publish = loss, publish_late
    assert (train(model, rows, output) / "emloc.json").is_file()
    output.with_name(f"reads-{os.environ['RANK']}.json").write_text(json.dumps(counts))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def two(tiny_model, rows, tmp_path_factory) -> Path:
    """An adapter by two processes."""
    output = tmp_path_factory.mktemp("two") / "adapter"
    assert run_together(2, train_and_count, tiny_model, rows, output) == [0, 0]
    return output


def require_as_one(two, model, rows, output):
    one = train(model, rows, output, accumulation=2 * SETTINGS.accumulation)
    logs = [read_json(directory / "log.json") for directory in (one, two)]
    assert len(logs[0]) == len(logs[1]) == 6 + 3
    for entry, other in zip(*logs, strict=True):
        assert entry == pytest.approx(other, rel=1e-5)
    actual, wanted = (load_file(directory / "adapter_model.safetensors") for directory in (two, one))
    for name, tensor in wanted.items():
        assert torch.allclose(actual[name], tensor, atol=2e-4), name  # AdamW makes much of a gradient's last bits


def test_two_processes_train_as_one_does_with_as_many_rows(two, tiny_model, rows, tmp_path):
    require_as_one(two, tiny_model, rows, tmp_path / "adapter")
    assert "6 exact steps on the base of 8 rows" in (two / "README.md").read_text()


@pytest.mark.thorough
def test_a_process_may_have_no_row_of_a_step(tiny_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 17)
    assert run_together(2, train, tiny_model, rows, tmp_path / "two") == [0, 0]
    require_as_one(tmp_path / "two", tiny_model, rows, tmp_path / "one")


def test_every_process_reads_every_block_twice_per_step(two):
    for rank in (0, 1):
        steps = read_json(two.with_name(f"reads-{rank}.json"))
        assert len(steps) == 6
        assert {count for step in steps for unit, count in step.items() if ".layers." in unit} == {2}


def train_until_killed(model, rows, output):
    take, calls = ExactSteps.loss, []

    def loss(self, *args, **options):
        calls.append(1)
        return kill() if len(calls) == 4 and os.environ["RANK"] == "1" else take(self, *args, **options)

    ExactSteps.loss = loss
    train(model, rows, output)


def test_where_one_is_killed_both_end_and_resume_bit_for_bit(two, tiny_model, rows, tmp_path):
    output = tmp_path / "adapter"
    assert run_together(2, train_until_killed, tiny_model, rows, output) == [1, -9]
    assert list(tmp_path.rglob("checkpoint-2"))
    assert not output.exists()
    assert run_together(2, train, tiny_model, rows, output) == [0, 0]
    assert contents(output) == contents(two)


ERRORS = {
    "ours": lambda: EmlocError("The base has changed.", "Restore it.", code="changed", resumable=True),
    "memory": lambda: MemoryError("no room"),
    "another": lambda: OSError("torn cable"),
}


def train_until_one_fails(model, rows, output, name):
    """Train until the second process cannot take its share of the second step; write what this one ends with."""
    share, calls = ExactSteps._share, []

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            raise ERRORS[name]()
        return share(self, *args, **options)

    ExactSteps._share = failing
    train_and_tell(model, rows, output)


def train_and_tell(model, rows, output):
    """Train, and write what this process ends with, if that is an error."""
    try:
        train(model, rows, output)
    except Exception as error:
        error_fields = [type(error).__name__, str(error), getattr(error, "code", None)]
        output.with_name(f"error-{os.environ['RANK']}.json").write_text(json.dumps(error_fields))


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("ours", ["EmlocError", "The base has changed. Restore it.", "changed"], "EmlocError"),
        ("memory", ["EmlocError", "Another process failed: MemoryError: no room.", "memory"], "EmlocError"),
        ("another", ["EmlocError", "Another process failed: OSError: torn cable.", "died"], "OSError"),
    ],
)
def test_where_one_fails_all_end_with_its_error(name, first, second, tiny_model, rows, tmp_path):
    assert run_together(2, train_until_one_fails, tiny_model, rows, tmp_path / "adapter", name) == [0, 0]
    errors = [read_json(tmp_path / f"error-{rank}.json") for rank in (0, 1)]
    assert [errors[0][0], errors[0][1].removesuffix(" Run the same command again."), errors[0][2]] == first
    assert errors[1][0] == second
    assert not (tmp_path / "adapter").exists()


def test_what_the_main_one_refuses_ends_all_alike(tiny_model, rows, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").touch()
    assert run_together(2, train_and_tell, tiny_model, rows, tmp_path / "adapter") == [0, 0]
    errors = [read_json(tmp_path / f"error-{rank}.json") for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert errors[0][0] == "EmlocError"
    assert "adapter exists" in errors[0][1]
