"""Training resumes from the newest of the trainer's own checkpoints that is complete."""

import shutil
from pathlib import Path

import pytest
from peft import PeftModel
from support.jobs import train_job

from emloc_core.settings import TrainSettings
from emloc_core.tuning.checkpoints import newest_checkpoint, remove_incomplete
from emloc_core.tuning.train import Train


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of the trainer's, of step 2."""
    directory = tmp_path_factory.mktemp("interrupted")

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Train, "_write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_job(tiny_model, rows_file, directory / "adapter", TrainSettings(steps=2, bf16=False)).run()
    return directory / ".adapter.partial" / "content" / "checkpoints" / "checkpoint-2"


FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_file_cut_short_is_removed(name, checkpoint, tmp_path):
    complete, cut = tmp_path / "checkpoint-2", tmp_path / "checkpoint-3"
    shutil.copytree(checkpoint, complete)
    shutil.copytree(checkpoint, cut)
    state = cut / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 2', '"global_step": 3'))
    remove_incomplete(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == cut  # still complete
    content = (cut / name).read_bytes()
    (cut / name).write_bytes(content[: len(content) // 2])
    remove_incomplete(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == complete
    assert not cut.exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_without_a_file_is_removed(name, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / name).unlink()
    remove_incomplete(tmp_path, 1)
    assert newest_checkpoint(tmp_path) is None


def test_every_process_must_have_written_its_random_state(checkpoint, tmp_path):
    copy = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, copy)
    for rank in range(2):
        shutil.copy(copy / "rng_state.pth", copy / f"rng_state_{rank}.pth")
    remove_incomplete(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == copy
    remove_incomplete(tmp_path, 3)
    assert newest_checkpoint(tmp_path) is None


def test_a_card_that_a_killed_run_began_is_written_again(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    def interrupt(_model: PeftModel, directory: str, **_options: object) -> None:
        if not Path(directory).name.startswith("checkpoint"):  # PEFT writes the trainer's checkpoints too
            (Path(directory) / "README.md").write_text("---\ntags: [lo\n---\n")  # which PEFT could not read
            raise KeyboardInterrupt

    def train() -> Path:
        return train_job(tiny_model, rows_file, tmp_path / "adapter", TrainSettings(steps=2, bf16=False)).run()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train()
    assert (train() / "README.md").read_text().startswith("---\nlibrary_name: peft")
