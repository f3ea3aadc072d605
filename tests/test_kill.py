"""Killed with SIGKILL at any step and run again, a stage gives the bytes of an uninterrupted run."""

import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from test_transfer import make_adapter, make_emulator
from transformers import AutoModelForCausalLM

#: Runs one stage through its Python API and kills itself when ``done`` steps are done; 0 never does.
RUN = """
    import os, signal, sys
    from pathlib import Path
    from emloc_core.adapter import Adapter
    from emloc_core.checkpoint import Checkpoint
    from emloc_core.data import load_rows
    from emloc_core.settings import CompressSettings, CorrectSettings

    stage, base, source, output, kill_at = sys.argv[1:]
    base, source, output, kill_at = Path(base), Path(source), Path(output), int(kill_at)
    factorizations = 0
    if stage == "compress":
        import emloc_core.factorize, emloc_core.plugins
        inner = emloc_core.factorize.factorize
        def counted(*args):
            global factorizations
            factorizations += 1
            return inner(*args)
        emloc_core.factorize.factorize = counted
        from emloc_core.emulator import Compression
        settings = CompressSettings(samples=12, selection=6, ratio=0.6)
        job = Compression(Checkpoint(base), load_rows(str(source)), output, settings)
    elif stage == "correct":
        from emloc_core.transfer import Transfer
        job = Transfer(Adapter(source), Checkpoint(base), output, CorrectSettings())
    else:
        from emloc_core.merge import Merge
        job = Merge(Adapter(source), Checkpoint(base), output)

    def progress(what, done, total):
        print(what, flush=True)
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    job.run(progress)
    print("factorizations", factorizations)
"""


def run(tmp_path, *argv):
    script = tmp_path / "stage.py"
    script.write_text(textwrap.dedent(RUN))
    return subprocess.run([sys.executable, script, *map(str, argv)], capture_output=True, text=True, check=False)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "timing.json"}


def killed_and_finished(tmp_path, stage, base, source, kill_at):
    """Kill at a step, run again; return the finished directory and what the second run printed."""
    output = tmp_path / "interrupted"
    killed = run(tmp_path, stage, base, source, output, kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    again = run(tmp_path, stage, base, source, output, 0)
    assert again.returncode == 0, again.stderr
    assert not output.with_name(".interrupted.partial").exists()
    return output, again.stdout


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
    return make_emulator(sharded, rows_file, tmp_path_factory.mktemp("kill") / "emulator")


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_compress(tmp_path, sharded, rows_file, emulator, kill_at):
    output, printed = killed_and_finished(tmp_path, "compress", sharded, rows_file, kill_at)
    assert contents(output) == contents(emulator)
    assert f"factorizations {7 * (3 - kill_at)}" in printed  # a finished block is not factorised again


@pytest.mark.parametrize("kill_at", [1, 10, 21])
def test_correct(tmp_path, sharded, emulator, kill_at):
    adapter = make_adapter(emulator, tmp_path / "adapter")
    whole = run(tmp_path, "correct", sharded, adapter, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    output, _ = killed_and_finished(tmp_path, "correct", sharded, adapter, kill_at)
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("kill_at", [1, 3])
def test_merge(tmp_path, sharded, kill_at):
    adapter = make_adapter(sharded, tmp_path / "adapter")
    assert run(tmp_path, "merge", sharded, adapter, tmp_path / "whole", 0).returncode == 0
    output, _ = killed_and_finished(tmp_path, "merge", sharded, adapter, kill_at)
    assert contents(output) == contents(tmp_path / "whole")


def test_half_a_shard_is_never_taken_for_a_whole_one(tmp_path, sharded, rows_file, emulator):
    output = tmp_path / "interrupted"
    assert run(tmp_path, "compress", sharded, rows_file, output, 2).returncode == -signal.SIGKILL
    staging = output.with_name(".interrupted.partial")
    (staging / ".model-00003-of-00004.safetensors.tmp").write_bytes(b"half")
    assert run(tmp_path, "compress", sharded, rows_file, output, 0).returncode == 0
    assert contents(output) == contents(emulator)
