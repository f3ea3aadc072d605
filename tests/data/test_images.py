"""Pictures of rows are found wherever they are, and every one that cannot be used is named before anything starts."""

import base64
import json
import sys
from io import BytesIO
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from emloc_internvl import INTERNVL
from PIL import Image
from support.jobs import compress_job, train_job
from support.rows import write_jsonl
from support.vision_models import conversation, internvl_processor, picture, picture_rows, save_model

from emloc_core.data.images import Picture
from emloc_core.data.rows import load_rows, write_rows
from emloc_core.data.tokenize import encode, load_processing, load_processor
from emloc_core.errors import EmlocError
from emloc_core.files.manifest import MANIFEST
from emloc_core.settings import CompressSettings, TrainSettings

ROW = conversation("which colours?", "red and blue.")


def png(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


PICTURE = png(picture(["red", "blue"]))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "internvl", INTERNVL, "internvl", internvl_processor())


def write_row(directory: Path, **columns) -> str:
    """Write a file with one row that can be used, and one with these columns."""
    (directory / "good.png").write_bytes(PICTURE)
    return str(write_jsonl(directory / "rows.jsonl", [ROW | {"images": ["good.png"]}, ROW | columns]))


def test_an_image_is_a_path_bytes_both_or_pils(tmp_path: Path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.png").write_bytes(PICTURE)
    absolute, pil = str(tmp_path / "here" / "a.png"), picture(["red", "blue"])
    encoded = base64.b64encode(PICTURE).decode()
    sources = [encoded, f"data:image/png;base64,{encoded}"]
    sources += ["here/a.png", absolute, Path("here/a.png"), PICTURE, {"bytes": PICTURE, "path": "gone.png"},
               {"bytes": None, "path": "here/a.png"}, pil]  # fmt: skip
    for source in sources:
        read = Picture.from_source(source, tmp_path).read()
        assert (read.mode, read.size, read.tobytes()) == ("RGB", (16, 8), pil.tobytes())


def test_an_image_is_upright_and_in_rgb():
    upright, content = picture(["red", "blue"]), BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    upright.rotate(90, expand=True).convert("RGBA").save(content, format="PNG", exif=exif)
    read = Picture.from_source(content.getvalue(), Path()).read()
    assert (read.mode, read.tobytes()) == ("RGB", upright.tobytes())


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"images": ["gone.png"]}, r"The image .*gone\.png does not exist"),
        ({"images": ["."]}, "is a directory"),
        ({"images": ["https://example.org/a.png"]}, "is not a path"),
        ({"images": ["data:image/png;base64,iVBORw0KGgo"]}, "is not valid base64"),
        ({"images": [{"path": None, "bytes": None}]}, "An image is given as dict"),
        ({"images": [7]}, "An image is given as int"),
        ({"images": "good.png"}, "`images` is str, not a list"),
        ({"images": ["good.png"], "image": "good.png"}, "has both `image` and `images`"),
        ({"messages": None, "text": "cat", "images": ["good.png"]}, "a row of text has images"),
        ({"prompt": "a", "completion": "b", "image": "good.png"}, "a row of prompt and completion has images"),
        ({"messages": conversation([{"type": "image"}], "a")["messages"]}, "1 image parts, but there are 0 images"),
        (
            {"messages": conversation([{"type": "image"}] * 2, "a")["messages"], "images": ["good.png"]},
            "2 image parts, but there are 1 images",
        ),
        (
            {"messages": conversation([{"type": "image"}], "a")["messages"], "images": ["good.png"] * 2},
            "1 image parts, but there are 2 images",
        ),
        (
            {"messages": conversation("<image>\na", "b")["messages"], "images": ["good.png"]},
            "a user's text contains <image>",
        ),
        (
            {
                "messages": conversation([{"type": "image"}, {"type": "text", "text": "<image> a"}], "b")["messages"],
                "images": ["good.png"],
            },
            "a user's text contains <image>",
        ),
        (
            {"messages": conversation("a", [{"type": "image"}])["messages"], "images": ["good.png"]},
            "the answer contains an image",
        ),
        ({"messages": conversation([{"type": "image", "image": "good.png"}], "a")["messages"]}, r"\['image', 'type'\]"),
        ({"messages": conversation([{"type": "video"}], "a")["messages"]}, "of type 'video'"),
        ({"messages": conversation(["a"], "a")["messages"]}, "a part that is not an object"),
        ({"messages": conversation([], "a")["messages"]}, "content is empty"),
        (
            {"messages": [{"role": "system", "content": "a"}, ROW["messages"][1]], "images": ["good.png"]},
            "0 image parts, but there are 1 images",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, columns: dict, complaint: str):
    file = write_row(tmp_path, **columns)
    with pytest.raises(EmlocError, match=complaint) as error:
        load_rows(file)
    assert f"{file}, row 2" in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not an image"),
        (b"not an image", "is not an image"),
        (PICTURE[: len(PICTURE) // 2], "is damaged: image file is truncated"),
        (PICTURE.replace(b"IDAT", b"IDAX"), "is not an image"),
    ],
    ids=["empty", "text", "cut short", "broken"],
)
def test_a_picture_that_cannot_be_decoded_stops_every_stage_before_it_starts(model, tmp_path, content, complaint):
    (tmp_path / "bad.png").write_bytes(content)
    file = write_row(tmp_path, images=["bad.png"])
    rows = load_rows(file)
    expected = rf"Row 2: The image .*bad\.png {complaint}"
    with pytest.raises(EmlocError, match=expected):
        encode(rows, load_processing(model, INTERNVL, rows))
    output = tmp_path / "output"
    for stage in (
        lambda: compress_job(model, rows, output, CompressSettings(samples=1, selection=1)).run(),
        lambda: train_job(model, file, output, TrainSettings(steps=1, bf16=False)).run(),
    ):
        with pytest.raises(EmlocError, match=expected):
            stage()
        assert {path.name for path in tmp_path.iterdir()} <= {"bad.png", "good.png", "rows.jsonl", ".emloc-hashes.json"}


def test_images_for_a_text_model_are_refused(tiny_model: Path, tmp_path: Path):
    file = write_row(tmp_path, images=[])
    complaint = "Row 1 has images, but models of the family llama read only text"
    rows, settings = load_rows(file), CompressSettings(samples=1, selection=1)
    with pytest.raises(EmlocError, match=complaint):
        compress_job(tiny_model, rows, tmp_path / "output", settings)
    with pytest.raises(EmlocError, match=complaint):
        train_job(tiny_model, file, tmp_path / "output", TrainSettings(steps=1))


def test_a_model_without_a_processor_is_refused(model: Path, tmp_path: Path):
    rows = load_rows(write_row(tmp_path, images=[]))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    with pytest.raises(EmlocError, match=rf"processor in {tmp_path} cannot be loaded"):
        load_processing(tmp_path, INTERNVL, rows)
    (tmp_path / "processor_config.json").write_bytes((model / "processor_config.json").read_bytes())
    with pytest.raises(EmlocError, match="the model's processor has no chat template"):
        encode(rows, load_processing(tmp_path, INTERNVL, rows))


def test_a_special_token_in_the_text_is_refused(model: Path, tmp_path: Path):
    rows = load_rows(write_row(tmp_path, messages=conversation("a <context>", "b")["messages"], images=["good.png"]))
    with pytest.raises(EmlocError, match="Row 2: the model's processor rejects it"):
        encode(rows, load_processing(model, INTERNVL, rows))


def test_a_prompt_that_is_cut_within_its_images_is_refused_or_dropped(model: Path, tmp_path: Path):
    file = picture_rows(tmp_path / "data")
    rows = load_rows(str(file))
    with pytest.raises(EmlocError, match="Row 1: its prompt with its images alone fills the 16 tokens"):
        encode(rows, load_processing(model, INTERNVL, rows), max_length=16)
    settings = TrainSettings(steps=1, batch_size=2, bf16=False, max_length=16)
    adapter = train_job(model, file, tmp_path / "a", settings).run()
    result = json.loads((adapter / MANIFEST).read_text())["result"]
    assert (result["rows"], result["dropped_rows"]) == (10, 100)  # those without a picture are left
    (tmp_path / "data" / "pictured.jsonl").write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(EmlocError, match="Every row's prompt with its images alone fills the 16 tokens"):
        train_job(model, tmp_path / "data" / "pictured.jsonl", tmp_path / "b", settings).run()
    assert not (tmp_path / "b").exists()


def test_without_pillow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(EmlocError, match="Pillow, which is not installed"):
        load_processor(tmp_path)
    with pytest.raises(EmlocError, match=r"Pillow, which is not installed\. pip install 'emloc\[vision\]'"):
        Picture.from_source(PICTURE, tmp_path).read()


def test_a_picture_that_changes_after_the_rows_were_read_is_an_error(tmp_path: Path):
    rows = load_rows(write_row(tmp_path, images=["good.png"]))
    (tmp_path / "good.png").write_bytes(png(picture(["pink"])))
    with pytest.raises(EmlocError, match=r"good\.png has changed"):
        rows[0].images[0].read()


def test_a_copy_is_the_same_row_wherever_its_picture_is(tmp_path: Path):
    parts = [{"type": "image"}, {"type": "text", "text": "which colours?"}]
    (tmp_path / "copy.png").write_bytes(PICTURE)
    (tmp_path / "other.png").write_bytes(png(picture(["red", "pink"])))
    file = write_row(tmp_path, image="copy.png")
    with open(file, "a") as more:
        more.write(
            json.dumps({"messages": conversation(parts, "red and blue.")["messages"], "images": ["copy.png"]}) + "\n"
        )
        more.write(
            json.dumps({"prompt": ROW["messages"][:1], "completion": ROW["messages"][1:], "images": ["good.png"]})
        )
    table = pyarrow.Table.from_pylist(
        [{"messages": conversation(parts, [{"type": "text", "text": "red and blue."}])["messages"],
          "images": [{"bytes": PICTURE, "path": None}]}]
    )  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = [*load_rows(file), *load_rows(str(tmp_path / "rows.parquet"))]
    assert len(rows) == 5
    assert len({row.key for row in rows}) == 1
    others = load_rows(write_row(tmp_path, image="other.png"))
    assert len({row.key for row in (rows[0], others[1])}) == 2
    plain = load_rows(str(write_jsonl(tmp_path / "plain.jsonl", [ROW])))[0]
    among_images = load_rows(write_row(tmp_path))[1]
    assert plain.key == among_images.key  # text stays text, whatever stands beside it
    assert (plain.images, among_images.images) == (None, ())


def test_parts_of_text_alone_are_a_string(tmp_path: Path):
    parts = [{"type": "text", "text": "which "}, {"type": "text", "text": "colours?"}]
    (row,) = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", [conversation(parts, "red and blue.")])))
    assert row.prompt == ROW["messages"][:1]


def test_a_data_set_of_the_hub_gives_its_images_undecoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("decoded, to be encoded again")

    (tmp_path / "a.png").write_bytes(PICTURE)
    features = datasets.Features({
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        "images": datasets.List(datasets.Image()),
    })  # fmt: skip
    rows = [ROW | {"images": [{"bytes": PICTURE, "path": None}]}, ROW | {"images": [{"path": str(tmp_path / "a.png")}]}]
    monkeypatch.setattr(datasets.Image, "decode_example", decoded)
    for column, feature in (("images", features["images"]), ("image", datasets.Image())):
        named = [{"messages": row["messages"], column: row["images"] if column == "images" else row["images"][0]}
                 for row in rows]  # fmt: skip
        dataset = datasets.Dataset.from_list(
            named, features=datasets.Features({"messages": features["messages"], column: feature})
        )
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, dataset=dataset, **__: dataset)
        loaded = load_rows("someone/pictures")
        local = load_rows(write_row(tmp_path))
        assert [row.key for row in loaded] == [local[0].key] * 2


def test_written_rows_hold_their_images_and_read_back(tmp_path: Path):
    content = BytesIO()
    picture(["red", "pink"]).save(content, format="JPEG")
    (tmp_path / "photo").write_bytes(content.getvalue())
    rows = load_rows(write_row(tmp_path, images=["photo"]))
    (tmp_path / "kept").mkdir()
    write_rows(tmp_path / "kept" / "rows.jsonl", rows)
    again = load_rows(str(tmp_path / "kept" / "rows.jsonl"))
    assert [row.key for row in again] == [row.key for row in rows]
    assert [row.images[0].path.read_bytes() for row in again] == [PICTURE, content.getvalue()]
    assert {path.suffix for path in (tmp_path / "kept" / "images").iterdir()} == {".png", ".jpeg"}


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_kept_rows_with_an_image_outside_the_directory_are_refused(model: Path, tmp_path: Path, kind: str):
    file = picture_rows(tmp_path / "data")
    settings = CompressSettings(samples=4, selection=2, ratio=0.6)
    emulator = compress_job(model, file, tmp_path / "emulator", settings).run()
    secret = tmp_path / "secret.png"
    secret.write_bytes(PICTURE)
    (emulator / "images" / "link.png").symlink_to(secret)
    image = {"parent": "../secret.png", "absolute": str(secret), "link": "images/link.png"}[kind]
    write_jsonl(emulator / "selection.jsonl", [ROW | {"images": [image]}])
    for read in (
        lambda: load_rows(str(emulator / "selection.jsonl")),
        lambda: train_job(emulator, file, tmp_path / "adapter", TrainSettings(steps=1)),
    ):
        with pytest.raises(EmlocError, match=rf"The image {image} is outside {emulator}"):
            read()


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    picture(["red"]).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(EmlocError, match="megapixels"):
        Picture.from_source("big.png", tmp_path).read()


@pytest.mark.parametrize("name", ["picture.eps", "picture.ppm", "picture.ico"])
def test_other_formats_are_not_read(tmp_path, name):
    """Pillow draws EPS by running Ghostscript."""
    picture(["red"]).save(tmp_path / name)
    with pytest.raises(EmlocError, match=r"is not an image \(PNG, JPEG"):
        Picture.from_source(name, tmp_path).read()
