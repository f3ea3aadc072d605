"""Two processes learn pictures: one LoRA, from noise of their own, resumed bit for bit."""

import os
from pathlib import Path

import pytest
import torch
from emloc_diffusers import training
from PIL import Image
from safetensors.torch import load_file, save_file
from support.killed import kill
from support.pipelines import flux_pipeline, picture_rows
from support.together import run_together
from transformers import TrainerCallback

import emloc_core as emloc
from emloc_core.files.documents import read_json, write_json
from emloc_core.tuning.trainer import LoraSteps

STEPS, KILLED = 4, 3
USUAL = {"steps": STEPS, "batch_size": 2, "save_steps": 2, "lora_rank": 2, "bf16": False, "logging_steps": 1}


class Watch(TrainerCallback):
    """Writes the LoRA that this process has at the end, or ends it before."""

    def __init__(self, output, killed):
        self.output, self.killed = output, killed

    def on_step_end(self, _args, state, _control, **_):
        if state.global_step == self.killed and os.environ["RANK"] == "1":
            kill()

    def on_train_end(self, _args, _state, _control, *, model, **_):
        lora = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        save_file(lora, f"{self.output}-{os.environ['RANK']}.safetensors")


def train(pipeline, rows, output, killed=None):
    """Train, and write what this process drew."""
    usual, error, drawn = LoraSteps.__init__, training.squared_error, []

    def watched(self, *args, **options):
        usual(self, *args, **options)
        self.add_callback(Watch(output, killed))

    def noted(*args, **group):
        drawn.append([group["sigma"].tolist(), group["noise"].sum().item()])
        return error(*args, **group)

    LoraSteps.__init__, training.squared_error = watched, noted
    emloc.train(pipeline, rows, output, **USUAL)
    write_json(Path(f"{output}-{os.environ['RANK']}.json"), drawn)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A pipeline, and rows of two shapes: a process may have both in a batch where the other has one."""
    directory = tmp_path_factory.mktemp("together")
    rows = picture_rows(directory / "rows", 7)
    for row in rows[::3]:
        Image.open(row["image"]).resize((16, 8)).save(row["image"])
    return str(flux_pipeline(directory / "pipeline")), rows


@pytest.fixture(scope="module")
def two(inputs, tmp_path_factory):
    """An adapter by two processes."""
    output = str(tmp_path_factory.mktemp("two") / "adapter")
    assert run_together(2, train, *inputs, output) == [0, 0]
    return output


def of_each(two, ending, read):
    return [read(Path(f"{two}-{rank}.{ending}")) for rank in (0, 1)]


def test_they_draw_noise_and_times_of_their_own(two):
    one, other = of_each(two, "json", read_json)
    times = [{time for sigma, _ in drawn for time in sigma} for drawn in (one, other)]
    assert all(len(values) == 2 * STEPS for values in times)
    assert not times[0] & times[1]
    assert not {noise for _, noise in one} & {noise for _, noise in other}


def test_they_have_the_same_lora_and_learned_by_the_gradients_of_both(two):
    one, other = of_each(two, "safetensors", load_file)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.thorough
def test_where_one_is_killed_they_resume_bit_for_bit(two, inputs, tmp_path):
    output = tmp_path / "adapter"
    assert run_together(2, train, *inputs, str(output), KILLED) == [1, -9]
    assert list(tmp_path.rglob("checkpoint-2"))
    assert not output.exists()
    assert run_together(2, train, *inputs, str(output)) == [0, 0]
    one, other = (load_file(f"{path}/adapter_model.safetensors") for path in (output, two))
    assert all(torch.equal(one[name], other[name]) for name in one)
