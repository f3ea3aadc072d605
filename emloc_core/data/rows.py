"""The user's rows: parsed, filtered by content, and written; :mod:`emloc_core.data.sources` reads them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from emloc_core.data.columns import NO_RENAMING
from emloc_core.data.mixture import is_splits, weighted, weights
from emloc_core.data.row import Row, Skipped, parse_rows
from emloc_core.data.sources import no_rows, reader_of
from emloc_core.errors import EmlocError
from emloc_core.files.manifest import MANIFEST
from emloc_core.settings import Loss

#: Files of an emulator with rows that must never be tuned on.
CALIBRATION, SELECTION = "calibration.jsonl", "selection.jsonl"
#: File of a run of ``emloc tune`` with rows that are answered before and after, and the file with its request.
HELD_OUT, TUNE_REQUEST = "held_out.jsonl", "tune.json"
#: Files of such a run with rows that were in memory. They are there first, so their names alone tell what they are.
ROWS, EVALUATED = "rows_in_memory.jsonl", "evaluated_in_memory.jsonl"
#: File of an output with the rows that were left out.
SKIPPED = "skipped_rows.jsonl"


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> None:
    """Write which rows were left out and why, one JSON object per line, without their contents."""
    lines = ({"source": Path(row.source).name, "row": row.number, "why": row.reason} for row in skipped)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def skipped_warnings(skipped: Sequence[Skipped]) -> list[str]:
    """Return a warning of rows that are left out, if there are any."""
    if not skipped:
        return []
    first = f"the first is row {skipped[0].number} of {skipped[0].source}: {skipped[0].reason}"
    return [f"rows that cannot be used are left out: {len(skipped)}, which {SKIPPED} will name ({first})"]


def load_rows(
    source: Any,
    split: str = "train",
    loss: Loss = "last",
    columns: Mapping[str, str] = NO_RENAMING,
    skipped: list[Skipped] | None = None,
) -> list[Row]:
    """Read rows from files, saved or hub datasets, or memory.

    Files are ``.jsonl``, ``.json`` (an array), ``.csv``, ``.tsv``, ``.txt`` (one row per line) and ``.parquet``, also
    compressed (``.gz``, ``.zst``); saved datasets are directories that ``save_to_disk`` wrote; a folder of pictures has
    a ``metadata.jsonl``, or a ``.txt`` beside each. Columns that are not of the row's form are ignored; if several
    forms are complete, prompt and completion take precedence over messages, these over ShareGPT's and Alpaca's columns,
    which become messages, and all over text. All rows must have the same form.

    Args:
        source: path of the file or directory, id of the dataset, or the rows themselves: mappings, as a
            ``datasets.Dataset`` yields them, or rows that were read before. Several sources: a list of them, or a
            mapping to their weights; see :func:`emloc_core.data.mixture.weighted`.
        split: split of a saved or hub dataset; files have none.
        loss: which answers of a conversation count.
        columns: names that the data have for columns, by the usual names: ``{"prompt": "question"}``. Rows without
            such a column, and those that an output keeps, are read as they are.
        skipped: list that receives the rows that cannot be used; None: the first of them is an error.

    Raises:
        EmlocError: the source cannot be read, is empty, or a row has no known form; names file and row.
    """
    if is_splits(source):
        if split not in source:
            raise EmlocError(f"The data have no split {split!r}.", f"Give one of these: {', '.join(map(str, source))}.")
        source = source[split]
    if isinstance(source, str | Path):
        name = str(source)
        read, directory = reader_of(name)
        # An output may come from someone else: it may only refer to its own images.
        confined = _is_kept(Path(source))
        own = NO_RENAMING if confined else columns
        rows = parse_rows(read(split), name, own, skipped, directory, confined=confined)
    elif (mixture := weights(source)) is not None:
        name, parts = "", ((part, load_rows(part, split, loss, columns, skipped)) for part in mixture)
        rows = (replace(row, source=part) for part, part_rows in parts for row in weighted(part_rows, mixture[part]))
    else:
        name, rows = "the rows", parse_rows(enumerate(source, start=1), "the rows", columns, skipped)
    return _of_one_form(name, [row if loss == "last" else replace(row, loss=loss) for row in rows])


def _of_one_form(source: str, rows: list[Row]) -> list[Row]:
    if not rows:
        raise no_rows(source or "The mixture")
    for row in rows:
        if row.form != rows[0].form:
            first = rows[0]
            where, other = (f"{source}, row {row.number}", f"row {first.number}") if source else (row.name, first.name)
            raise EmlocError(f"{where}: a row of {row.form}, but {other} is of {first.form}.", "Use one form for all.")
    if any(row.images is not None for row in rows):
        return [row if row.images is not None else replace(row, images=()) for row in rows]
    return rows


def without(
    rows: Iterable[Row], files: Iterable[Path], split: str = "train", columns: Mapping[str, str] = NO_RENAMING
) -> list[Row]:
    """Return the rows whose content is in none of ``files``, in their order; an empty file leaves none out.

    Raises:
        EmlocError: a file cannot be read.
    """
    some = [path for path in files if not path.is_file() or path.stat().st_size]
    keys = {row.key for path in some for row in load_rows(str(path), split, columns=columns)}
    return [row for row in rows if row.key not in keys]


def _is_kept(path: Path) -> bool:
    """Return whether a file holds rows that an emulator or a run keeps, in the usual columns."""
    if path.name in (ROWS, EVALUATED):
        return True
    beside = {CALIBRATION: MANIFEST, SELECTION: MANIFEST, HELD_OUT: TUNE_REQUEST}.get(path.name)
    return beside is not None and (path.parent / beside).is_file()


def digest(rows: Iterable[Row]) -> str:
    """Return the SHA-256, in hex, of the contents of ``rows`` in their order."""
    return hashlib.sha256("".join(row.key for row in rows).encode()).hexdigest()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL that :func:`load_rows` can read, whole or not at all, and their images beside it.

    Raises:
        EmlocError: an image cannot be read.
    """
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            content = json.dumps(row.to_dict(), ensure_ascii=False, default=lambda picture: picture.write(path.parent))
            file.write(f"{content}\n")
    partial.replace(path)
