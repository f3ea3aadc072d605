"""Folders of pictures as rows."""

import json

import pytest
from PIL import Image

from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError


@pytest.fixture
def folder(tmp_path):
    for name, shade in (("b.PNG", 20), ("a.jpg", 90)):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / name)
    return tmp_path


def prompts(folder):
    return [(row.prompt, row.images[0].read().size, row.weight) for row in load_rows(str(folder))]


def test_a_picture_has_its_prompt_in_a_text_beside_it(folder):
    (folder / "a.txt").write_text("a cat\n", encoding="utf-8")
    (folder / "b.txt").write_text("ein Hund, schön", encoding="utf-8")
    assert prompts(folder) == [("a cat", (8, 8), 1.0), ("ein Hund, schön", (8, 8), 1.0)]


def test_a_picture_without_a_text_is_named(folder):
    (folder / "a.txt").write_text("a cat")
    with pytest.raises(EmlocError, match=r"b\.PNG has no b\.txt beside it"):
        load_rows(str(folder))


def test_metadata_are_read_as_scripts_of_diffusers_write_them(folder):
    rows = [{"file_name": "a.jpg", "text": "a cat"}, {"file_name": "b.PNG", "prompt": "a dog", "weight": 0.5}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prompts(folder) == [("a cat", (8, 8), 1.0), ("a dog", (8, 8), 0.5)]


def test_a_folder_of_nothing_is_refused(tmp_path):
    with pytest.raises(EmlocError, match="is a directory"):
        load_rows(str(tmp_path))
