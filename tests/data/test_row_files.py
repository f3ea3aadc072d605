"""CSV and saved datasets hold the same rows as other files."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from support.rows import example_rows

from emloc_core.data.rows import Skipped, load_rows, write_skipped
from emloc_core.errors import EmlocError


def test_cells_of_csv_are_text_as_it_is_written(tmp_path: Path):
    path = tmp_path / "rows.csv"
    long = "a" * 200_000
    path.write_text(f'\ufeffprompt,completion,note\n"a, ""b""\nc",007,\nNA,null,x\n{long},1.50,\n', encoding="utf-8")
    rows = load_rows(path)
    assert [(row.number, row.prompt, row.completion) for row in rows] == [
        (1, 'a, "b"\nc', "007"), (2, "NA", "null"), (3, long, "1.50"),
    ]  # fmt: skip
    path.write_text("prompt,completion\na,\n")
    with pytest.raises(
        EmlocError, match=r"rows\.csv, row 1: has the columns \['prompt'\].*Rename columns with --columns"
    ):
        load_rows(path)
    (tmp_path / "rows.tsv").write_text("prompt\tcompletion\na, b\tc\n")
    assert load_rows(tmp_path / "rows.tsv")[0].prompt == "a, b"


def test_weights_of_pictures_are_numbers_texts_or_none(tmp_path: Path):
    table = tmp_path / "rows.csv"
    table.write_text("caption,image,w\na,a.png,0.5\nb,b.png,\n")
    rows = [{"caption": "a", "image": "a.png", "w": 0.5}, {"caption": "b", "image": "b.png", "w": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    for path in (table, tmp_path / "rows.parquet"):
        loaded = load_rows(path, columns={"prompt": "caption", "weight": "w"})
        assert [row.weight for row in loaded] == [0.5, 1.0]
    table.write_text("prompt,image,weight\na,a.png,much\n")
    with pytest.raises(EmlocError, match="`weight` is 'much', not a number above 0"):
        load_rows(table)


def test_saved_datasets_hold_the_same_rows(tmp_path: Path, rows_file: Path):
    rows = load_rows(rows_file)
    data = Dataset.from_list(example_rows())
    data.save_to_disk(tmp_path / "one")
    splits = DatasetDict({"train": data, "test": data.select(range(3))})
    splits.save_to_disk(tmp_path / "splits")
    assert load_rows(tmp_path / "one") == load_rows(tmp_path / "splits") == load_rows(splits) == rows
    assert load_rows(tmp_path / "splits", "test") == load_rows(splits, "test") == rows[:3]
    with pytest.raises(EmlocError, match=r"has no split 'dev'\. Give one of: train, test"):
        load_rows(tmp_path / "splits", "dev")
    with pytest.raises(EmlocError, match=r"no split 'dev'\. Give one of these: train, test"):
        load_rows(splits, "dev")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(EmlocError, match="cannot be read as a saved dataset"):
        load_rows(tmp_path / "one")


def test_delimiters_are_read_from_the_header(tmp_path: Path):
    cells = [["prompt", "completion"], ["a, b; c\td", "e"]]
    for name, delimiter in (("a.csv", ";"), ("b.csv", "\t"), ("c.csv", ","), ("d.tsv", "\t"), ("e.tsv", ";")):
        lines = [delimiter.join(f'"{cell}"' for cell in row) for row in cells]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8-sig")
        assert [(row.prompt, row.completion) for row in load_rows(tmp_path / name)] == [tuple(cells[1])]
    (tmp_path / "one.csv").write_text('"text; and, more"\nx;y\n')
    with pytest.raises(EmlocError, match=r"has the columns \['text; and, more'\]"):
        load_rows(tmp_path / "one.csv")


def test_lines_of_text_are_rows(tmp_path: Path):
    path = tmp_path / "rows.txt"
    path.write_bytes("\ufeffone\r\n\n  two\u2028three \n".encode())
    assert [(row.number, row.text) for row in load_rows(path)] == [(1, "one"), (3, "two\u2028three")]
    path.write_bytes(b"one\n\xff\n")
    with pytest.raises(EmlocError, match=r"rows\.txt, row 2: not UTF-8"):
        load_rows(path)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "é"), ("a.csv", "text\né"), ("a.jsonl", '{"text": "é"}')])
def test_another_encoding_is_named(tmp_path: Path, name: str, content: str):
    path = tmp_path / name
    path.write_text(content, encoding="latin-1")
    with pytest.raises(EmlocError, match=r"row 1: .*'utf-8' codec.*Save the file as UTF-8"):
        load_rows(path)


@pytest.mark.parametrize(("suffix", "codec"), [(".gz", "gzip"), (".zst", "zstd")])
def test_compressed_files_hold_the_same_rows(suffix: str, codec: str, tmp_path: Path, rows_file: Path):
    csv = tmp_path / "rows.csv"
    csv.write_text("prompt;completion\na;b\n")
    for source in (rows_file, csv):
        packed = tmp_path / f"{source.name}{suffix}"
        with pyarrow.output_stream(packed, compression=codec) as stream:
            stream.write(source.read_bytes())
        assert load_rows(packed) == load_rows(source)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(EmlocError, match="cannot be unpacked"):
        load_rows(packed)
    with pytest.raises(EmlocError, match=r"does not end in \.jsonl.*nor one of these with \.gz"):
        load_rows(csv.rename(tmp_path / f"rows.xlsx{suffix}"))


def test_bad_rows_are_left_out_where_that_is_asked_for(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n{"prompt": "b"}\n[1]\n{"text": "c"}\n')
    skipped: list[Skipped] = []
    assert [row.number for row in load_rows(path, skipped=skipped)] == [1, 5]
    assert [row.number for row in skipped] == [2, 3, 4]
    assert "not valid JSON" in skipped[0].reason
    write_skipped(tmp_path / "skipped.jsonl", skipped)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["source"], line["row"]) for line in lines] == [("rows.jsonl", number) for number in (2, 3, 4)]
    assert not any(str(tmp_path) in line["why"] for line in lines)  # outputs are published
    with pytest.raises(EmlocError, match="row 2: not valid JSON"):
        load_rows(path)
    csv = tmp_path / "rows.csv"
    csv.write_text("text,more\na,b\na,b,c\nd,\n")
    assert [row.number for row in load_rows(csv, skipped=skipped)] == [1, 3]
    path.write_text("{\n")
    with pytest.raises(EmlocError, match="holds no rows"):
        load_rows(path, skipped=[])
