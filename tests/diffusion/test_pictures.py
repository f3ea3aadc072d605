"""What is drawn, and what tuning takes."""

import json

import numpy
import pytest
import torch
from click.testing import CliRunner
from diffusers import FluxTransformer2DModel
from emloc_diffusers.calls import call_of, packed, unpacked
from emloc_diffusers.encoding import Encoded, Encoder
from emloc_diffusers.families import FAMILIES
from emloc_diffusers.flow import Times
from emloc_diffusers.pictures import Drawing, grid
from emloc_diffusers.pipeline import Parts
from emloc_diffusers.training import Pictures, sizes
from PIL import Image
from support.pipelines import flux_pipeline, picture_rows

import emloc_core as emloc
from emloc_core.cli import cli
from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.evaluation.new_task import write_task
from emloc_core.files.checkpoint import open_checkpoint
from emloc_core.files.pretrained import load_lora
from emloc_core.model.opened import open_model
from emloc_core.objective import RowSize


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A pipeline that makes pixels, since it has no VAE; grey, as its four channels are a patch of 2 x 2."""
    directory = tmp_path_factory.mktemp("pixels")
    tiny = {**FAMILIES[0].tiny_configs[1], "in_channels": 4}  # which takes guidance
    return flux_pipeline(directory / "pipeline", tiny, vae=False)


def encoder(pipeline, tokens=None):
    model = open_model(str(pipeline), "cpu")
    return Encoder(Parts(pipeline), call_of(model.family.auto_class), model.config, tokens)


def test_patches_are_unpacked_as_they_were_packed():
    latents = torch.randn(2, 3, 4, 6)
    assert packed(latents).shape == (2, 6, 12)
    assert torch.equal(unpacked(packed(latents), 4, 6), latents)


def test_pixels_are_learned_as_they_are_drawn(pixels):
    (row,) = load_rows([{"prompt": "a cat", "image": Image.effect_noise((8, 6), 60)}])
    (encoded,) = encoder(pixels).encode([row])
    assert encoded.latents.shape == (1, 6, 8)
    grey = torch.from_numpy(numpy.asarray(row.images[0].read().convert("L")).copy()).reshape(1, 6, 8)
    assert torch.allclose(encoded.latents, grey / 127.5 - 1)


def test_large_pictures_are_scaled_down_to_the_most_patches_and_cut_to_whole_ones(pixels):
    rows = load_rows([{"prompt": "a cat", "image": Image.new("L", (41, 20))}])
    assert [tuple(sample.latents.shape) for sample in encoder(pixels).encode(rows)] == [(1, 20, 40)]
    assert [tuple(sample.latents.shape) for sample in encoder(pixels, tokens=50).encode(rows)] == [(1, 8, 20)]


def test_a_picture_below_a_patch_is_refused(pixels):
    rows = load_rows([{"prompt": "a cat", "image": Image.new("L", (9, 1))}])
    with pytest.raises(EmlocError, match="smaller than a patch"):
        encoder(pixels).encode(rows)


def test_what_is_encoded_is_kept_by_content(pixels, tmp_path, monkeypatch):
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path))
    rows = load_rows([{"prompt": prompt, "image": Image.new("L", (4, 4), 9)} for prompt in ("a cat", "a dog", "a cat")])
    first = encoder(pixels).encode(rows)
    assert len(list((tmp_path / "encoded").glob("*.safetensors"))) == 3  # two prompts, one picture
    monkeypatch.setattr(Parts, "load", lambda *_: pytest.fail("it is kept"))
    again = encoder(pixels).encode(rows)
    assert all(torch.equal(a.prompt["tokens"], b.prompt["tokens"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].prompt["tokens"], first[1].prompt["tokens"])


def test_rows_of_one_number_in_several_sources_are_learned_each(pixels, tmp_path):
    for source, shade in (("a", 20), ("b", 90)):
        (tmp_path / source).mkdir()
        Image.new("L", (4, 4), shade).save(tmp_path / source / "0.png")
        (tmp_path / source / "0.txt").write_text({"a": "a cat", "b": "a dog"}[source])
    rows = load_rows([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [row.number for row in rows] == [1, 1]
    for sample, row in zip(encoder(pixels).encode(rows), rows, strict=True):
        (alone,) = encoder(pixels).encode([row])
        assert torch.equal(sample.latents, alone.latents)
        assert torch.equal(sample.prompt["tokens"], alone.prompt["tokens"])


def test_a_row_is_as_long_as_its_patches_and_its_sequence_of_tokens():
    prompt = {"tokens": torch.zeros(5, 24), "pooled": torch.zeros(768)}
    row = Encoded("Row 1", torch.zeros(4, 8, 8), prompt, 1.0, "")
    assert sizes(Pictures([row], Times("uniform"), "FluxTransformer2DModel")) == [RowSize(16 + 5, 16 + 5)]


def test_a_part_with_code_of_its_own_is_refused(pixels, tmp_path):
    index = json.loads((pixels / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["mine", "Encoder"]}))
    with pytest.raises(EmlocError, match="neither transformers nor diffusers"):
        Parts(tmp_path).load("text_encoder")


def test_the_grid_shows_base_and_adapter_from_the_same_noise(pixels, tmp_path):
    rows = [{**row, "image": Image.open(row["image"])} for row in picture_rows(tmp_path / "rows", 4)]
    adapter = emloc.train(str(pixels), rows, str(tmp_path / "adapter"), steps=2, batch_size=2, lora_rank=2)
    options = ["--adapter", str(adapter.path), "--prompt", "a cat", "--prompt", "a dog", "--side", "8", "--steps", "2"]
    drawn = CliRunner().invoke(cli, ["pictures", str(pixels), *options, "-o", str(tmp_path / "grid.png")])
    assert drawn.exit_code == 0, drawn.output
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.height == 16 + 2 * 12
    options = [*options[2:], "--guidance", "9", "-o", str(tmp_path / "guided.png")]
    assert CliRunner().invoke(cli, ["pictures", str(pixels), *options]).exit_code == 0
    guided = Drawing(str(pixels)).draw(["a cat", "a dog"], side=8, steps=2, guidance=9.0)
    with Image.open(tmp_path / "guided.png") as sheet:
        assert sheet.tobytes() == grid({"base": guided}, ["a cat", "a dog"], 8).tobytes()
    one, again = (Drawing(str(pixels)).draw(["a cat", "a dog"], side=8, steps=2) for _ in range(2))
    assert [picture.tobytes() for picture in one] == [picture.tobytes() for picture in again]
    assert one[0].tobytes() != guided[0].tobytes()
    assert grid({"base": one}, ["a", "b"], 16).width > 32


def test_systems_are_scored_on_held_out_pictures(pixels, tmp_path):
    train, held_out = tmp_path / "train", tmp_path / "held-out"
    rows = picture_rows(held_out, 3)
    (held_out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = emloc.train(str(pixels), picture_rows(train, 4), str(tmp_path / "adapter"), steps=2, batch_size=2,
                          lora_rank=2, learning_rate=0.05)  # fmt: skip
    options = ["--adapter", str(adapter.path), "--data", str(held_out), "--side", "8", "--steps", "2"]
    done = CliRunner().invoke(cli, ["pictures", str(pixels), *options, "-o", str(tmp_path / "grid.png"), "--json"])
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout)["systems"]
    model = open_model(str(pixels), "cpu")
    samples = model.samples(load_rows(str(held_out)), 16, "evaluation")
    transformer = FluxTransformer2DModel.from_pretrained(str(pixels / "transformer")).eval()
    for name, lora in (("base", None), ("adapter", adapter.path)):
        system = load_lora(transformer, lora) if lora else transformer
        with torch.no_grad():
            total, count = torch.stack([sample.loss(system, "cpu") for sample in samples]).sum(0)
        assert scores[name]["loss"] == pytest.approx(float(total / count), rel=1e-5)
    assert scores["base"] != scores["adapter"]


def test_lm_eval_is_told_apart_from_what_scores_pictures(pixels, rows_file, tmp_path):
    task = write_task("completion_nll", rows_file, tmp_path / "loss.yaml")
    with pytest.raises(EmlocError, match="does not write text") as caught:
        emloc.evaluate(str(task), tmp_path / "results", base=str(pixels))
    assert "emloc pictures" in caught.value.fix


def test_without_rows_and_prompts_there_is_nothing_to_draw(pixels):
    done = CliRunner().invoke(cli, ["pictures", str(pixels)])
    assert isinstance(done.exception, EmlocError)
    assert "--data" in done.exception.fix


def test_the_transformer_of_a_pipeline_is_opened(pixels):
    assert open_checkpoint(str(pixels)).directory.name == "transformer"


def test_a_pipeline_in_the_cache_of_the_hub_is_read_from_its_blobs(pixels, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in pixels.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(pixels)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(file.read_bytes())
        link.symlink_to(blobs / str(number))
    assert open_model(str(snapshot), "cpu").skeleton.blocks
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "transformer" / "secret.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(EmlocError, match="is a link"):
        open_checkpoint(str(snapshot))
