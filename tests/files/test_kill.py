"""Killed with SIGKILL at any step and run again, a stage gives the bytes of an uninterrupted run."""

import shutil

import pytest
import torch
from support.adapters import contents, make_adapter
from support.jobs import compress_job, correct_job, merge_job
from support.killed import kill, run_until_killed
from support.marks import thorough
from transformers import AutoModelForCausalLM

from emloc_core.settings import CompressSettings, CorrectSettings
from emloc_core.standins import LowRank


def make(stage, base, source, output):
    if stage == "compress":
        settings = CompressSettings(samples=12, selection=6, ratio=0.6, calibration="base")
        return compress_job(base, source, output, settings)
    if stage == "correct":
        return correct_job(source, base, output, CorrectSettings())
    return merge_job(source, base, output)


def run_until(step, *job):
    """Run a stage that kills its process when so many steps are done."""
    make(*job).run(lambda _description, done, _total: kill() if done == step else None)


def killed_and_finished(stage, base, source, output, kill_at):
    """Kill at a step, run again; return the finished directory."""
    run_until_killed(run_until, kill_at, stage, base, source, output)
    assert not output.exists()
    assert output.with_name(f".{output.name}.partial").is_dir()
    make(stage, base, source, output).run()
    assert not output.with_name(f".{output.name}.partial").exists()
    return output


@pytest.fixture(scope="module")
def sharded(tiny_model, tmp_path_factory):
    """The tiny model in several shards, so that a merge can be killed between them."""
    directory = tmp_path_factory.mktemp("kill") / "base"
    shutil.copytree(tiny_model, directory)
    (directory / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.save_pretrained(directory, max_shard_size="40kB")
    return directory


@pytest.fixture(scope="module")
def emulator(sharded, rows_file, tmp_path_factory):
    return make("compress", sharded, rows_file, tmp_path_factory.mktemp("kill") / "emulator").run()


@pytest.fixture(scope="module")
def carried(sharded, emulator, tmp_path_factory):
    """An adapter of the emulator, and what an uninterrupted run carries over to the base."""
    directory = tmp_path_factory.mktemp("correct")
    adapter = make_adapter(emulator, directory / "adapter")
    return adapter, make("correct", sharded, adapter, directory / "corrected").run()


@pytest.fixture(scope="module")
def folded(sharded, tmp_path_factory):
    """An adapter of the base, and what an uninterrupted run makes of both."""
    directory = tmp_path_factory.mktemp("merge")
    adapter = make_adapter(sharded, directory / "adapter")
    return adapter, make("merge", sharded, adapter, directory / "merged").run()


@pytest.fixture
def factorised(monkeypatch):
    """The Linears that were factorised in this process."""
    calls, inner = [], LowRank.factorize
    monkeypatch.setattr(LowRank, "factorize", staticmethod(lambda *args: (calls.append(1), inner(*args))[1]))
    return calls


@pytest.mark.parametrize("kill_at", [2, *thorough(1, 3)])
def test_compress(tmp_path, sharded, rows_file, emulator, factorised, kill_at):
    output = killed_and_finished("compress", sharded, rows_file, tmp_path / "interrupted", kill_at)
    assert contents(output) == contents(emulator)
    assert len(factorised) == 7 * (3 - kill_at)  # a finished block is not factorised again


@pytest.mark.parametrize("kill_at", [10, *thorough(1, 21)])
def test_correct(tmp_path, sharded, carried, kill_at):
    adapter, uninterrupted = carried
    output = killed_and_finished("correct", sharded, adapter, tmp_path / "interrupted", kill_at)
    assert contents(output) == contents(uninterrupted)


@pytest.mark.parametrize("kill_at", [3, *thorough(1)])
def test_merge(tmp_path, sharded, folded, kill_at):
    adapter, uninterrupted = folded
    output = killed_and_finished("merge", sharded, adapter, tmp_path / "interrupted", kill_at)
    assert contents(output) == contents(uninterrupted)


def test_half_a_shard_is_never_taken_for_a_whole_one(tmp_path, sharded, rows_file, emulator):
    output = tmp_path / "interrupted"
    run_until_killed(run_until, 2, "compress", sharded, rows_file, output)
    staging = output.with_name(".interrupted.partial") / "content"
    (staging / ".model-00003-of-00004.safetensors.tmp").write_bytes(b"half")
    make("compress", sharded, rows_file, output).run()
    assert contents(output) == contents(emulator)
