"""The demo with pictures: who sees which digits, what the model is given, and the whole way in a few steps."""

import json
from itertools import combinations

import emloc_demo.vision.command
import emloc_demo.vision.pretraining
import emloc_demo.vision.rows
import numpy
import pytest
import torch
from emloc_demo.vision.command import explain, prepare
from emloc_demo.vision.conversations import Conversations, cell_labels
from emloc_demo.vision.pictures import (
    CELL,
    COLOURS,
    GRID,
    NEW_QUESTION,
    QUESTIONS,
    TURNS,
    Picture,
    compose,
    load_digits,
)
from emloc_demo.vision.pretraining import make_model, pretrain
from emloc_demo.vision.processor import IMAGE_TOKENS, make_processor, make_tokenizer
from emloc_demo.vision.rows import PARTS, split, write_data
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from emloc_core.data.rows import CALIBRATION, SELECTION, load_rows, without
from emloc_core.files.documents import read_json
from emloc_core.files.manifest import MANIFEST
from emloc_core.recipe.recipe import load_recipe
from emloc_core.recipe.run import summarise
from emloc_core.recipe.stages import stages
from emloc_core.stages.perform import perform


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    """The demo's data, with fewer training rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emloc_demo.vision.rows, "TRAIN", 60)
        patch.setattr(emloc_demo.vision.rows, "TEST", 40)
        return write_data(tmp_path_factory.mktemp("demo") / "data", split(digits))


def strokes_in(row):
    """The digits that a row's picture shows: the brightness of every cell that is not black, as bytes."""
    pixels = numpy.asarray(row.images[0].read()).max(axis=-1)  # each colour has a channel at its full
    cells = pixels.reshape(GRID, CELL, GRID, CELL).swapaxes(1, 2).reshape(-1, CELL, CELL)
    return {cell.tobytes() for cell in cells if cell.any()}


def test_each_digit_belongs_to_one_part(digits):
    parts = split(digits)
    assert {name: len(part) for name, part in parts.items()} == PARTS
    shown = [{strokes.tobytes() for strokes in part.strokes[0]} for part in parts.values()]
    assert len(set.union(*shown)) == sum(map(len, shown)) == len(digits) == 1797
    assert all(set(part.values.tolist()) == set(range(10)) for part in parts.values())


def test_pictures_of_different_files_share_no_digit_with_each_other_or_with_pretraining(digits, data):
    shown = {
        name: set.union(*map(strokes_in, load_rows(str(data / f"{name}.jsonl"))))
        for name in ("calibration", "train", "test")
    }
    shown["pretraining"] = {strokes.tobytes() for strokes in split(digits)["pretraining"].strokes[0]}
    for one, other in combinations(shown, 2):
        assert not shown[one] & shown[other]
    assert len(shown["calibration"]) == PARTS["calibration"]


def test_no_two_pictures_for_calibration_and_selection_share_a_digit(data):
    shown = [strokes_in(row) for row in load_rows(str(data / "calibration.jsonl"))]
    assert len(shown) == 96
    assert len(set.union(*shown)) == sum(map(len, shown))


def test_the_same_seed_draws_the_same_data(digits, data, tmp_path, monkeypatch):
    monkeypatch.setattr(emloc_demo.vision.rows, "TRAIN", 60)
    monkeypatch.setattr(emloc_demo.vision.rows, "TEST", 40)
    again = write_data(tmp_path / "data", split(digits))
    other = write_data(tmp_path / "other", split(digits, seed=1), seed=1)
    files = sorted(path.relative_to(data) for path in data.rglob("*.*"))
    assert len(files) == 4 + 96 + 60 + 40
    assert all((data / file).read_bytes() == (again / file).read_bytes() for file in files)
    assert (data / "train.jsonl").read_bytes() != (other / "train.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_answers_are_what_the_picture_shows():
    picture = Picture(numpy.zeros(0), (7, 3, 7), ("red", "blue", "green"), (0, 4, 8))
    answers = dict(picture.questions())
    assert answers == {
        "Which digits are there?": "7 3 7",
        "How many digits are there?": "3",
        "Which digit is red?": "7",
        "Which digit is blue?": "3",
        "Which digit is green?": "7",
        "What colour is the 3?": "blue",  # and none about the 7: there are two
    }
    assert NEW_QUESTION not in answers
    assert picture.answer(NEW_QUESTION) == "3 7 7"


def test_digits_stand_in_their_cells_in_their_colours(digits):
    picture = compose(digits, [5, 900, 40], numpy.random.default_rng(3))
    assert picture.digits == tuple(digits.values[[5, 900, 40]])
    assert list(picture.cells) == sorted(set(picture.cells))
    for index, (cell, colour) in enumerate(zip(picture.cells, picture.colours, strict=True)):
        top, left = CELL * (cell // GRID), CELL * (cell % GRID)
        shown = picture.pixels[top : top + CELL, left : left + CELL]
        assert (shown.max(axis=-1) == digits.strokes[0, [5, 900, 40][index]]).all()
        brightest = shown[numpy.unravel_index(shown.sum(axis=-1).argmax(), (CELL, CELL))].astype(int)
        assert numpy.abs(brightest / brightest.max() - numpy.array(COLOURS[colour]) / 255).max() < 0.02
    values, colours = cell_labels([picture])
    assert [(i, int(d)) for i, d in enumerate(values[0]) if d < 10] == list(
        zip(picture.cells, picture.digits, strict=True)
    )
    assert [list(COLOURS)[c] for c in colours[0] if c < len(COLOURS)] == list(picture.colours)


def test_every_word_is_in_the_vocabulary_and_comes_back():
    tokenizer = make_tokenizer()
    questions = [text.format(colour=colour, digit=7) for text in QUESTIONS.values() for colour in COLOURS]
    for text in [*questions, NEW_QUESTION, *COLOURS, "0 1 2 3", "4 5 6 7 8 9"]:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer("3 7 1")["input_ids"]) == "3 7 1"


def test_pretraining_sees_what_the_saved_processor_makes(digits, tmp_path):
    make_processor().save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    picture = compose(digits, [1, 2, 3], numpy.random.default_rng(0))
    turns = [(QUESTIONS["read"], "1 2 3"), (QUESTIONS["count"], "3")]
    inputs = Conversations(make_tokenizer(), digits, 0).inputs([picture], [turns])
    messages = [{"role": role, "content": [{"type": "text", "text": text}]}
                for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]  # fmt: skip
    messages[0]["content"].insert(0, {"type": "image"})
    text = processor.apply_chat_template(messages)
    processed = processor(images=[Image.fromarray(picture.pixels)], text=text, return_tensors="pt")
    assert processed["input_ids"].tolist() == inputs["input_ids"].tolist()
    assert processed["input_ids"].eq(processor.image_token_id).sum() == IMAGE_TOKENS
    assert torch.allclose(processed["pixel_values"], inputs["pixel_values"], atol=1e-6)
    learnt = inputs["labels"][inputs["labels"] >= 0]
    assert processor.decode(learnt) == "1 2 3 <|end|> 3 <|end|>"


def test_pretraining_lowers_the_loss_and_publishes_an_ordinary_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(emloc_demo.vision.pretraining, "BATCH", 8)
    monkeypatch.setattr(emloc_demo.vision.pretraining, "WARMUP", 1)
    losses = []
    part = split(load_digits(TURNS[:2]))["pretraining"]
    base = pretrain(
        tmp_path / "base", part, steps=12, advance=lambda description, *_: losses.append(float(description.split()[1]))
    )
    assert losses[-1] < losses[0] - 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    model, loading = AutoModelForImageTextToText.from_pretrained(base, output_loading_info=True)
    assert not any(loading.values())
    fresh = make_model(make_tokenizer()).state_dict()
    assert not any(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items() if "mlp" in name)
    one, other = (pretrain(tmp_path / name, part, steps=2) / "model.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_an_interrupted_pretraining_leaves_no_base_and_starts_again(tmp_path, data, monkeypatch):
    monkeypatch.setattr(emloc_demo.vision.pretraining, "BATCH", 2)
    pretrained = []

    def interrupted(directory, digits, **_):
        def stop(*_):
            raise KeyboardInterrupt

        pretrained.append(directory)
        pretrain(directory, digits, steps=2, advance=stop)

    (tmp_path / "data").symlink_to(data)
    monkeypatch.setattr(emloc_demo.vision.pretraining, "pretrain", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path)
    assert pretrained == [tmp_path / "base"] * 2
    assert not (tmp_path / "base").exists()


@pytest.mark.thorough
@pytest.mark.usefixtures("calls_here")
def test_the_whole_way_in_a_few_steps(tmp_path, data, monkeypatch):
    """Each stage's command as the recipe gives it, with fewer rows and steps, in this process: starting is slow."""
    monkeypatch.setattr(emloc_demo.vision.pretraining, "BATCH", 4)

    def short(directory, digits, **_):
        return pretrain(directory, digits, steps=2)

    monkeypatch.setattr(emloc_demo.vision.pretraining, "pretrain", short)
    (tmp_path / "data").symlink_to(data)
    fewer = ["compress.samples=6", "compress.selection=4", "train.steps=2", "train.batch_size=2", "eval.limit=2"]
    recipe = load_recipe(prepare(tmp_path), fewer)
    planned = stages(recipe)
    for stage in planned:
        perform(stage.request)
    results = summarise(recipe, planned)
    assert set(results["systems"]) == {
        "base", "emulator", "emulator+lora", "base+uncorrected", "base+corrected", "merged", "full_lora",
    }  # fmt: skip
    assert {"nll", "order.exact_match", "read.exact_match"} <= set(results["metrics"])
    assert results["compression"]["bytes"]["emulator"] < 0.8 * results["compression"]["bytes"]["base"]
    linears = read_json(tmp_path / "emulator" / MANIFEST)["result"]["linears"]
    low_rank = {linear["path"] for linear in linears if linear["relative_error"] is not None}
    assert any("vision_tower" in path for path in low_rank)
    assert any("language_model" in path for path in low_rank)
    kept = [tmp_path / "emulator" / name for name in (CALIBRATION, SELECTION)]
    assert [len(load_rows(str(path))) for path in kept] == [6, 4]
    assert len(without(load_rows(str(data / "calibration.jsonl")), kept)) == 86
    assert "What you see" in explain(results)
    assert "base+corrected" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text()) == results
