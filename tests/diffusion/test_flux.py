"""FLUX.1 through all stages: streamed forwards, exact gradients, files that pipelines load."""

import diffusers
import pytest
import torch
from click.testing import CliRunner
from emloc_diffusers.encoding import Encoder
from emloc_diffusers.flow import squared_error
from emloc_diffusers.lora_file import FILE
from emloc_diffusers.training import ExactFlow
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from support.pipelines import flux_pipeline, picture_rows
from support.rows import write_jsonl

import emloc_core as emloc
from emloc_core.cli import cli
from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.exact.lora import lora_on
from emloc_core.files.pretrained import load_lora
from emloc_core.model.opened import open_model
from emloc_core.model.streaming import Stream
from emloc_core.settings import TrainSettings
from emloc_core.tuning.trl import lora_config


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A pipeline, rows, and what the stages make of them."""
    directory = tmp_path_factory.mktemp("flux")
    pipeline, rows = flux_pipeline(directory / "pipeline"), picture_rows(directory / "rows")
    emulator = emloc.compress(str(pipeline), rows, str(directory / "emulator"), samples=3, selection=2, ratio=0.5)
    adapter = emloc.train(emulator, rows, str(directory / "adapter"), steps=3, batch_size=2, lora_rank=2, lora_alpha=4)
    corrected = emloc.correct(adapter, output=str(directory / "corrected"))
    polished = emloc.polish(corrected, rows, str(directory / "polished"), steps=2, batch_size=2, accumulation=2)
    merged = emloc.merge(polished, str(directory / "merged"))
    return {"pipeline": pipeline, "rows": rows, "emulator": emulator, "adapter": adapter, "corrected": corrected,
            "polished": polished, "merged": merged}  # fmt: skip


@pytest.fixture
def base(outputs):
    return open_model(str(outputs["pipeline"]), "cpu")


def in_memory(outputs):
    return diffusers.FluxTransformer2DModel.from_pretrained(str(outputs["pipeline"] / "transformer")).eval()


def drawn(model, outputs, purpose="selection"):
    return model.samples(load_rows(outputs["rows"]), None, purpose)


def test_a_streamed_forward_is_that_of_the_model_in_memory(outputs, base):
    model, samples = in_memory(outputs), drawn(base, outputs)
    streamed = Stream(base.skeleton).run(
        [lambda sample=sample: sample.run(base.skeleton.model, "cpu") for sample in samples]
    )
    with torch.no_grad():
        assert all(
            torch.equal(sample.run(model, "cpu"), output) for sample, output in zip(samples, streamed, strict=True)
        )


def test_draws_differ_by_purpose_and_not_by_call(outputs, base):
    one, again, other = (drawn(base, outputs, purpose) for purpose in ("selection", "selection", "calibration"))
    assert all(torch.equal(a.inputs("cpu")["noise"], b.inputs("cpu")["noise"]) for a, b in zip(one, again, strict=True))
    assert not {sample.seed for sample in one} & {sample.seed for sample in other}
    assert {sample.row for sample in one} == {f"Row {number}" for number in range(1, 7)}
    sigmas = [sample.sigma for sample in other if sample.row == "Row 1"]
    assert len(sigmas) == 16
    assert [int(16 * sigma) for sigma in sigmas] == list(range(16))  # over the whole range


def test_exact_gradients_are_those_of_the_ordinary_step_and_every_block_is_read_twice(outputs, base):
    def batch(sample):
        inputs = sample.inputs("cpu")
        first = {name: inputs.pop(name) for name in ("latents", "noise", "sigma")}
        return {**first, "prompt": inputs, "weight": torch.tensor([sample.encoded.weight])}

    batches = [batch(sample) for sample in drawn(base, outputs)[::7]]
    settings = lora_config(TrainSettings(lora_rank=3), base.family.lora_targets(), None)
    ordinary = get_peft_model(in_memory(outputs), settings)
    for name, parameter in ordinary.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    call = drawn(base, outputs)[0].call
    loss = sum(squared_error(ordinary, call, **group).sum() for group in batches) / len(batches)
    loss.backward()
    lora = lora_on(base.skeleton, settings)
    set_peft_model_state_dict(lora, get_peft_model_state_dict(ordinary))
    steps = ExactFlow(lora.get_base_model(), base.skeleton)
    assert torch.allclose(steps.loss([{"groups": [group]} for group in batches]), loss, rtol=1e-6)
    expected = {name: parameter.grad for name, parameter in ordinary.named_parameters() if parameter.requires_grad}
    gradients = {name: parameter.grad for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-7), name
    assert {block: steps.weights.reads[block] for block in base.skeleton.blocks} == dict.fromkeys(
        base.skeleton.blocks, 2
    )
    steps.close()


def test_an_emulator_fitted_with_the_lora_trains_it_further(outputs, tmp_path):
    pipeline, rows, corrected = str(outputs["pipeline"]), outputs["rows"], str(outputs["corrected"])
    fitted = {"samples": 3, "selection": 2, "ratio": 0.5, "adapter": corrected}
    emulator = emloc.compress(pipeline, rows, str(tmp_path / "emulator"), **fitted)
    tuned = emloc.train(emulator, rows, str(tmp_path / "adapter"), steps=1, batch_size=2, learning_rate=1e-30)
    before, after = (load_file(f"{path}/adapter_model.safetensors") for path in (corrected, tuned.path))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_pipelines_load_the_lora_exactly(outputs):
    pipeline = diffusers.FluxPipeline.from_pretrained(str(outputs["pipeline"]))
    pipeline.load_lora_weights(str(outputs["polished"]), weight_name=FILE)
    ours = load_lora(in_memory(outputs), outputs["polished"].path)
    merged = diffusers.FluxTransformer2DModel.from_pretrained(str(outputs["merged"]))
    sample = drawn(open_model(str(outputs["pipeline"]), "cpu"), outputs)[0]
    with torch.no_grad():
        loaded, expected, folded, plain = (
            sample.run(model, "cpu") for model in (pipeline.transformer, ours, merged, in_memory(outputs))
        )
    assert torch.allclose(loaded, expected, atol=1e-6)
    assert torch.allclose(folded, expected, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3
    assert all(key.startswith("transformer.") for key in load_file(outputs["polished"].path / FILE))


def test_the_emulator_is_smaller_and_is_what_is_trained_on(outputs):
    result = outputs["emulator"].result
    assert result["bytes"]["emulator"] < 0.7 * result["bytes"]["base"]
    assert outputs["adapter"].result["excluded_rows"] == 0  # few rows: other noise is drawn for them instead
    assert outputs["adapter"].result["rows"] == 6


@pytest.mark.parametrize(("stage", "on"), [("train", "pipeline"), ("polish", "corrected")])
def test_a_dry_run_tells_of_the_largest_picture_and_of_copies(stage, on, outputs, tmp_path, monkeypatch):
    monkeypatch.delattr(Encoder, "encode")  # which may take minutes
    rows = write_jsonl(tmp_path / "rows.jsonl", [*outputs["rows"], outputs["rows"][0]])
    source = str(getattr(outputs[on], "path", outputs[on]))
    arguments = [source, "--data", str(rows), "-o", str(tmp_path / "out"), "--dry-run"]
    output = CliRunner().invoke(cli, [stage, *arguments]).output
    assert "longest row: 4 tokens" in output
    assert "duplicates: 1 row" in output


def test_rows_of_text_are_refused(outputs):
    with pytest.raises(EmlocError, match="make pictures"):
        emloc.train(str(outputs["pipeline"]), [{"text": "once upon a time"}], "never", steps=1)


def test_pictures_are_refused_by_models_of_text(outputs, tiny_model):
    with pytest.raises(EmlocError, match="has images"):
        emloc.train(str(tiny_model), outputs["rows"], "never", steps=1)


def test_a_transformer_without_its_pipeline_is_refused(outputs, tmp_path):
    alone = tmp_path / "alone"
    in_memory(outputs).save_pretrained(alone)
    with pytest.raises(EmlocError, match="not part of a pipeline"):
        emloc.compress(str(alone), outputs["rows"], str(tmp_path / "emulator"), samples=2, selection=2)


def test_cards_say_how_pipelines_load_what_was_made(outputs):
    texts = {name: (outputs[name].path / "README.md").read_text() for name in ("emulator", "polished", "merged")}
    assert all("AutoTokenizer" not in text for text in texts.values())
    assert 'pipe.load_lora_weights("DIRECTORY"' in texts["polished"]
    assert 'FluxTransformer2DModel.from_pretrained("DIRECTORY")' in texts["merged"]
    assert "library_name: diffusers" in texts["merged"]
