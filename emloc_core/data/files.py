"""Reads rows from files as they are: JSONL, JSON, CSV, Parquet, and directories that ``datasets`` saved.

:mod:`emloc_core.data.rows` parses them.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emloc_core.data.hub import undecoded
from emloc_core.errors import EmlocError, first_line
from emloc_core.files.limits import unpacking

#: A row's position in its source, from 1, and its columns.
Numbered = tuple[int, Any]
#: Files that ``save_to_disk`` of ``datasets`` leaves: of a dataset, and of one with several splits.
_SAVED = ("state.json", "dataset_dict.json")


def is_saved(path: Path) -> bool:
    """Return whether a path is a directory that ``save_to_disk`` of ``datasets`` wrote."""
    return any((path / name).is_file() for name in _SAVED)


def read_file(path: Path) -> Iterator[Numbered]:
    """Yield the rows of a file, in the format that its suffix names.

    Raises:
        EmlocError: it has another suffix, or cannot be read.
    """
    if path.suffix not in READERS:
        raise EmlocError(f"{path} is none of {', '.join(READERS)}.", "Convert it to one of these.", code="unsupported")
    yield from READERS[path.suffix](path)


def read_saved(path: Path, split: str) -> Iterator[Numbered]:
    """Yield the rows of a directory that ``save_to_disk`` wrote.

    Args:
        path: the directory.
        split: which one, if there are several.

    Raises:
        EmlocError: it cannot be read, or has no such split.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EmlocError(
            f"{path} cannot be read as a saved dataset ({first_line(error)}).", "Save it again.", code="damaged"
        ) from None
    if isinstance(found, DatasetDict):
        if split not in found:
            raise EmlocError(f"{path} has no split {split!r}.", f"Give one of: {', '.join(found)}.", code="missing")
        found = found[split]
    yield from enumerate(undecoded(found), start=1)


def _jsonl(path: Path) -> Iterator[Numbered]:
    with open(path, "rb") as file:  # as bytes: str.splitlines would also split at U+2028 within a string
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _decode(line, f"{path}, row {number}")


def _json(path: Path) -> Iterator[Numbered]:
    content = _decode(path.read_bytes(), str(path))
    if not isinstance(content, list):
        raise EmlocError(f"{path} is not an array of rows.", "Wrap the rows in [ ], or name the file .jsonl.")
    yield from enumerate(content, start=1)


def _decode(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers of thousands of digits, or too deep
        raise EmlocError(f"{where}: not valid JSON ({error}).", "Correct it.") from None


def _csv(path: Path) -> Iterator[Numbered]:
    """Yield rows whose cells are text, as they are written: an empty one is absent, and nothing becomes a number."""
    csv.field_size_limit(sys.maxsize)  # 128 KB otherwise
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(
                csv.DictReader(file, delimiter=_DELIMITERS[path.suffix], strict=True), start=1
            ):
                if None in row:
                    raise EmlocError(f"{path}, row {number}: more cells than columns.", "Quote cells with delimiters.")
                yield number, {name: cell or None for name, cell in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise EmlocError(f"{path}, row {number + 1}: not valid CSV ({error}).", "Correct it.") from None


def _parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow
    import pyarrow.parquet

    try:
        with unpacking([path]):
            rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise EmlocError(
            f"{path} cannot be read as Parquet ({error}).", "Make the file again.", code="damaged"
        ) from None
    yield from enumerate(rows, start=1)


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
#: Readers by suffix.
READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
