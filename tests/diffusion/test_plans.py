"""Plans of transformers that make pictures, from their configs alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emloc_diffusers.families import FAMILIES, FLUX
from emloc_diffusers.step import FlowStep
from PIL import Image
from support.pipelines import SHALLOW, flux_pipeline, picture_rows

import emloc_core as emloc
from emloc_core.files.checkpoint import find_config
from emloc_core.memory import planned_model
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload, make_workload
from emloc_core.settings import TrainSettings

#: All classes, of which one is enough for `make test`.
CASES = [
    pytest.param(family, id=family.name, marks=() if family is FLUX else pytest.mark.thorough) for family in FAMILIES
]
USUAL = {"kind": "low-rank", "ratio": 0.5, "batch_size": 1, "lora_rank": 2, "device": "cuda"}


def write(directory, settings):
    directory.mkdir(parents=True, exist_ok=True)
    others = {name: value for name, value in settings.items() if name != "model_type"}
    (directory / "config.json").write_text(json.dumps({"_class_name": settings["model_type"], **others}))
    return str(directory / "config.json")


def needs(planned):
    return {need.stage: need for need in planned.needs}


@pytest.mark.parametrize("family", CASES)
def test_every_stage_is_planned_and_tuning_grows_with_the_picture(family, tmp_path):
    file = write(tmp_path, SHALLOW if family is FLUX else family.tiny_configs[0])
    planned = emloc.plan(file, length=9, memory="1GB", **USUAL)
    weights, tuned = planned.describe()["weight_bytes"], needs(planned)["LoRA on the emulator"].terms
    assert tuned["weights"] == weights["emulator"] < weights["base"]
    assert tuned["optimiser"] == 2 * tuned["adapter"] == 8 * planned.model.adapter_parameters()
    larger = planned.model.with_workload(replace(planned.model.workload, length=36))
    assert larger.tuning(planned.plan).terms["activations"] > tuned["activations"]
    assert "logits" not in needs(planned)["exact steps"].terms
    assert {"encode the rows", "compress", "correct", "exact steps", "merge"} <= needs(planned).keys()


@pytest.mark.parametrize("family", CASES)
def test_a_linear_is_given_what_passes_through_it(family, tmp_path):
    model = MemoryModel(Path(write(tmp_path, family.tiny_configs[0])), Workload(1, 16))
    step = FlowStep(model)
    positions = {path: step.positions(path) for path, module in model.model.named_modules()
             if isinstance(module, torch.nn.Linear)}  # fmt: skip
    assert set(positions.values()) <= {1, 16, step.row.tokens - 16, step.row.tokens, 32, step.row.tokens + 16}
    assert max(positions.values()) >= step.row.tokens - 16 > 16
    if family is FLUX:
        assert positions["transformer_blocks.0.norm1.linear"] == 1
        assert positions["transformer_blocks.0.attn.to_q"] == 16
        assert positions["transformer_blocks.0.attn.add_q_proj"] == 512
        assert positions["single_transformer_blocks.0.proj_mlp"] == 528


@pytest.mark.thorough
def test_a_few_blocks_are_traced_for_all(tmp_path, monkeypatch):
    def totals():
        planned_model._cached.cache_clear()
        model = MemoryModel(file, Workload(1, 16))
        return [need.total for need in (model.tuning(), model.tuning(model.plan(0.5)), model.inference())]

    file = Path(write(tmp_path, {**FLUX.tiny_configs[0], "num_layers": 5, "num_single_layers": 4}))
    few = totals()
    monkeypatch.setattr("emloc_core.memory.depth._OUTER", 100)
    assert totals() == few


def test_a_plan_of_rows_counts_the_patches_of_the_largest_picture(tmp_path):
    pipeline, rows = flux_pipeline(tmp_path / "pipeline"), picture_rows(tmp_path / "rows", 4)
    large = tmp_path / "large.png"
    Image.new("RGB", (40, 24)).save(large)
    planned = emloc.plan(str(pipeline), data=[*rows, {"prompt": "a cat", "image": str(large)}], memory="1GB", **USUAL)
    assert planned.describe()["workload"]["length"] == 40 * 24 // 4**2  # a latent is two pixels wide, and a patch two
    assert planned.describe()["dtype"] == "float32"  # as the files have it
    rows = [{"prompt": "a", "image": str(large)}]
    shorter = make_workload(find_config(str(pipeline)), TrainSettings(), "cuda", data=rows, length=8)
    assert shorter.length == 6  # scaled down to eight patches, and cut to 3 x 2


@pytest.mark.thorough
def test_the_encoders_are_those_of_the_pipeline_or_as_published(tmp_path):
    pipeline = flux_pipeline(tmp_path / "pipeline")
    reads = [path for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
             for path in (pipeline / part).iterdir()]  # fmt: skip
    read, drawn = (sum(path.stat().st_size for path in files) for files in (reads, (pipeline / "vae").iterdir()))
    there = needs(emloc.plan(str(pipeline), length=16, memory="1GB", **USUAL))["encode the rows"]
    assert there.terms["weights"] == max(read, drawn)  # they are not there together
    alone = needs(emloc.plan(write(tmp_path / "alone", SHALLOW), length=16, memory="1GB", **USUAL))
    assert alone["encode the rows"].terms["weights"] > 9e9
