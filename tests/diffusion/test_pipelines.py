"""A whole pipeline of every family: its encoders are read, its transformer is tuned, and it draws."""

import inspect
from functools import partial

import diffusers
import pytest
import torch
from emloc_diffusers.lora_file import FILE
from emloc_diffusers.pictures import Drawing
from emloc_diffusers.pipeline import Parts
from support.pipelines import (
    flux2_pipeline,
    flux_pipeline,
    picture_rows,
    qwen_image_pipeline,
    sd3_pipeline,
    z_image_pipeline,
)

import emloc_core as emloc

#: What writes a pipeline, and the options of its call that draw as EMLoC draws.
CASES = {
    "FLUX.1": (flux_pipeline, {"max_sequence_length": 6}),
    "FLUX.2 klein": (flux2_pipeline, {}),
    "Stable Diffusion 3": (sd3_pipeline, {}),
    "Stable Diffusion 3 without T5": (partial(sd3_pipeline, t5=False), {}),
    "Qwen-Image": (qwen_image_pipeline, {"negative_prompt": [" ", " "]}),
    "Z-Image": (z_image_pipeline, {}),
}
QUICK = ("FLUX.2 klein", "Qwen-Image")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in CASES]
)
def test_a_pipeline_is_tuned_and_draws_as_by_diffusers(name, tmp_path):
    write, options = CASES[name]
    pipeline, prompts = write(tmp_path / "pipeline"), ["a cat", "a photo of a dog"]
    rows = picture_rows(tmp_path / "rows", 2, 16)
    adapter = emloc.train(str(pipeline), rows, str(tmp_path / "adapter"), steps=1, batch_size=2, lora_rank=2,
                          learning_rate=0.1, bf16=False)  # fmt: skip
    before, after = (Drawing(str(pipeline), lora) for lora in (None, adapter.path))
    parts = Parts(pipeline)
    absent = {name: None for name, part in parts.index.items() if isinstance(part, list) and not parts.has(name)}
    theirs = getattr(diffusers, parts.class_name).from_pretrained(str(pipeline), **absent)
    theirs.load_lora_weights(str(adapter.path), weight_name=FILE)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = theirs(prompt=prompts, height=16, width=16, num_inference_steps=2, generator=generators, **options)
    drawn = [drawing.draw(prompts, side=16, steps=2) for drawing in (before, after)]
    assert after.call.guidance in inspect.signature(theirs.__call__).parameters
    assert [picture.tobytes() for picture in drawn[1]] == [picture.tobytes() for picture in expected.images]
    assert all(one.tobytes() != other.tobytes() for one, other in zip(*drawn, strict=True))
