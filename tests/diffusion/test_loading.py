"""Emulators are loaded by diffusers itself, and are what EMLoC trains on."""

import subprocess
import sys

import diffusers
import pytest
import torch
from emloc_diffusers import quantizer
from emloc_diffusers.lora_file import FILE
from emloc_diffusers.pictures import Drawing
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.contracts import contract
from support.pipelines import flux_pipeline, picture_rows

import emloc_core as emloc
from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.pretrained import load_lora
from emloc_core.model.opened import open_model

KINDS = ("low-rank", "nf4")
TUNED = {"steps": 2, "batch_size": 2, "lora_rank": 2, "learning_rate": 0.05, "bf16": False}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A pipeline in bfloat16, rows, emulators by their kind, and a LoRA."""
    directory = tmp_path_factory.mktemp("loading")
    pipeline, rows = flux_pipeline(directory / "pipeline"), picture_rows(directory / "rows", 4)
    plain(pipeline / "transformer", torch.bfloat16).save_pretrained(pipeline / "transformer")
    few = {"samples": 2, "selection": 1}
    emulators = {kind: emloc.compress(str(pipeline), rows, str(directory / kind), kind=kind, **few).path
                 for kind in KINDS}  # fmt: skip
    adapter = emloc.train(str(pipeline), rows, str(directory / "adapter"), **TUNED)
    return {"pipeline": pipeline, "rows": rows, "adapter": adapter.path, **emulators}


def plain(directory, dtype=torch.bfloat16):
    return diffusers.FluxTransformer2DModel.from_pretrained(str(directory), torch_dtype=dtype)


def streamed(directory, outputs):
    """The emulator as EMLoC loads it, and a sample."""
    model = open_model(str(directory), "cpu")
    model.skeleton.load_parameters([name for name, _ in model.skeleton.model.named_parameters()])
    return model.skeleton.model.eval(), model.samples(load_rows(outputs["rows"]), None, "selection")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_what_was_made_and_saves_it(kind, outputs, tmp_path, caplog):
    loaded, (ours, sample) = plain(outputs[kind]), streamed(outputs[kind], outputs)
    assert loaded.dtype == ours.dtype == torch.bfloat16
    assert not caplog.records  # of keys in the config, or of weights, that diffusers does not know
    loaded.save_pretrained(tmp_path / "saved")
    again = plain(tmp_path / "saved")
    theirs, others = dict(loaded.named_parameters()), dict(again.named_parameters())
    for name, parameter in ours.named_parameters():
        assert theirs[name].dtype == parameter.dtype, name  # ranges of scales are in fp32
        assert torch.equal(theirs[name], parameter), name
        assert torch.equal(others[name], parameter), name
    with torch.no_grad():
        assert torch.equal(sample.run(loaded, "cpu"), sample.run(ours, "cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_made_dense(kind, outputs):
    loaded, (_, sample) = plain(outputs[kind], torch.float32), streamed(outputs[kind], outputs)
    with torch.no_grad():
        wanted, actual = sample.run(loaded, "cpu"), sample.run(loaded.dequantize(), "cpu")
    assert torch.allclose(actual, wanted, atol=1e-4)
    assert {type(module) for module in loaded.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_draws_with_an_emulator_and_loads_the_lora_into_it(kind, outputs):
    """Pipelines of FLUX.1 would take a factor for a weight that the LoRA is too large for, and change it."""
    emulator, sample = plain(outputs[kind], torch.float32), streamed(outputs[kind], outputs)[1]
    pipe = diffusers.FluxPipeline.from_pretrained(str(outputs["pipeline"]), transformer=emulator)
    pipe.set_progress_bar_config(disable=True)

    def drawn():
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", height=8, width=8, num_inference_steps=2, generator=generator, output_type="latent",
                    max_sequence_length=6).images  # fmt: skip

    before = drawn()
    assert torch.isfinite(before).all()
    pipe.load_lora_weights(str(outputs["adapter"]), weight_name=FILE)
    assert not torch.equal(drawn(), before)
    with torch.no_grad():
        actual, without = sample.run(emulator, "cpu"), sample.run(plain(outputs[kind], torch.float32), "cpu")
        wanted = sample.run(load_lora(plain(outputs[kind], torch.float32), outputs["adapter"]), "cpu")
    assert torch.allclose(actual, wanted, atol=1e-5)
    assert (actual - without).abs().max() > 1e-2
    pipe.unload_lora_weights()
    assert torch.equal(drawn(), before)


def test_peft_trains_a_lora_on_it_and_refuses_what_would_not_hold_on_the_base(outputs):
    targets = ["attn.to_q"]
    lora = get_peft_model(plain(outputs["nf4"]), LoraConfig(r=2, target_modules=targets))
    _, sample = streamed(outputs["nf4"], outputs)
    sample.run(lora, "cpu").float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in lora.parameters() if parameter.requires_grad)
    with pytest.raises(EmlocError, match="DoRA"):
        get_peft_model(plain(outputs["nf4"]), LoraConfig(r=2, target_modules=targets, use_dora=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_emulator_draws_in_place_of_its_base_and_in_its_dtype(kind, outputs):
    base, emulator = Drawing(str(outputs["pipeline"])), Drawing(str(outputs[kind]))
    assert {base.pipe.transformer.dtype, base.pipe.vae.dtype, emulator.pipe.vae.dtype} == {torch.bfloat16}
    stored, loaded = plain(outputs[kind]).state_dict(), emulator.pipe.transformer.state_dict()
    assert all(torch.equal(loaded[name], part) and loaded[name].dtype == part.dtype for name, part in stored.items())
    one, other = (drawing.draw(["a cat"], side=8, steps=2)[0] for drawing in (base, emulator))
    assert one.tobytes() != other.tobytes()


def test_an_emulator_that_lacks_a_part_is_refused(outputs, tmp_path):
    part = "transformer_blocks.0.attn.to_q.weight_scales"
    for file in outputs["nf4"].iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            tensors.pop(part, None)
            save_file(tensors, tmp_path / file.name)
        elif file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    content = read_json(index)
    del content["weight_map"][part]
    write_json(index, content)
    with pytest.raises(EmlocError, match=f"lacks {part}"):
        plain(tmp_path)


@pytest.mark.thorough
def test_it_is_loaded_without_an_import_of_ours(outputs):
    code = f"""
from diffusers import Flux2KleinPipeline  # which begins with the loaders of LoRAs: they import the quantizers, and ours
from diffusers import FluxTransformer2DModel
print(FluxTransformer2DModel.from_pretrained({str(outputs["nf4"])!r}).is_quantized)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@contract("diffusers", "emloc_diffusers.quantizer")
def test_quantizers_are_registered_in_two_dictionaries():
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    settings = {"quant_method": "emloc", "format": "nf4", "ranks": {}}
    actual = DiffusersAutoQuantizer.from_config(DiffusersAutoQuantizer.from_dict(settings), pre_quantized=True)
    assert isinstance(actual, quantizer.Quantizer), "AUTO_QUANTIZER_MAPPING is not what is looked in"
