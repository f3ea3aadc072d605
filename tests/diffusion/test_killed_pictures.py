"""Training and exact steps of pictures that are killed midway, and resumed."""

import pytest
import torch
from safetensors.torch import load_file
from support.killed import kill, run_until_killed
from support.marks import thorough
from support.pipelines import flux_pipeline, picture_rows
from transformers import TrainerCallback

import emloc_core as emloc
from emloc_core.files.documents import read_json
from emloc_core.tuning.trainer import LoraSteps

STEPS, KILLED = 6, 4
USUAL = {"steps": STEPS, "batch_size": 2, "save_steps": 2, "lora_rank": 2, "lora_dropout": 0.1, "bf16": False}


class _Killer(TrainerCallback):
    def on_step_end(self, _args, state, _control, **_):
        if state.global_step == KILLED:
            kill()


def killed(pipeline, rows, output, exact):
    """Train until the process is killed after a step."""
    usual = LoraSteps.__init__

    def watched(self, *args, **options):
        usual(self, *args, **options)
        self.add_callback(_Killer())

    LoraSteps.__init__ = watched
    emloc.train(pipeline, rows, output, exact=exact, **USUAL)


@pytest.mark.parametrize("exact", [False, *thorough(True)], ids=["in memory", "exact steps"])
def test_a_killed_training_resumes_to_the_same_lora(exact, tmp_path):
    pipeline, rows = str(flux_pipeline(tmp_path / "pipeline")), picture_rows(tmp_path / "rows", 6)
    uninterrupted = emloc.train(pipeline, rows, str(tmp_path / "whole"), exact=exact, **USUAL)
    output = str(tmp_path / "resumed")
    run_until_killed(killed, pipeline, rows, output, exact)
    assert not (tmp_path / "resumed").exists()  # nothing that looks whole
    resumed = emloc.train(pipeline, rows, output, exact=exact, **USUAL)
    one, other = (load_file(adapter.path / "adapter_model.safetensors") for adapter in (uninterrupted, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [[(entry["step"], entry.get("loss")) for entry in read_json(adapter.path / "log.json")]
            for adapter in (uninterrupted, resumed)]  # fmt: skip
    assert logs[0] == logs[1]
