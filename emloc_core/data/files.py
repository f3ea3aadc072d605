"""Reads rows from files: JSONL, JSON, CSV, text and Parquet; :mod:`emloc_core.data.rows` parses them."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from emloc_core.errors import EmlocError
from emloc_core.files.limits import unpacking

#: A row's position in its source, from 1, and its columns; or why it cannot be read.
Numbered = tuple[int, Any]


def read_file(path: Path) -> Iterator[Numbered]:
    """Yield the rows of a file, in the format that its suffix names.

    Raises:
        EmlocError: it has another suffix, or cannot be read.
    """
    if not names_rows(path):
        formats = f"{', '.join(READERS)}, nor one of these with {' or '.join(_COMPRESSED)}"
        raise EmlocError(
            f"{path} does not end in {formats}.", "Convert it to one of these formats.", code="unsupported"
        )
    yield from READERS[_format(path)](path)


def names_rows(path: Path) -> bool:
    """Return whether a path has the suffix of a file of rows."""
    return _format(path) in READERS


def _format(path: Path) -> str:
    """Return the suffix that names the format, without the suffix of a compression."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _open(path: Path) -> IO[bytes]:
    """Open a file, unpacked into memory if it is compressed."""
    if path.suffix not in _COMPRESSED:
        return open(path, "rb")
    import pyarrow

    try:
        with unpacking([path]), pyarrow.input_stream(path, compression=_COMPRESSED[path.suffix]) as stream:
            return io.BytesIO(stream.read())
    except (pyarrow.ArrowException, OSError) as error:
        raise EmlocError(f"{path} cannot be unpacked ({error}).", "Make the file again.", code="damaged") from None


def _jsonl(path: Path) -> Iterator[Numbered]:
    with _open(path) as file:  # as bytes: str.splitlines would also split at U+2028 within a string
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _row(line, f"{path}, row {number}")


def _row(line: bytes, where: str) -> Any:
    """Return what a line holds, or the error if it cannot be read: the lines after it can."""
    try:
        return _decode(line, where)
    except EmlocError as error:
        return error


def _json(path: Path) -> Iterator[Numbered]:
    with _open(path) as file:
        content = _decode(file.read(), str(path))
    if not isinstance(content, list):
        raise EmlocError(f"{path} is not an array of rows.", "Wrap the rows in [ ], or name the file .jsonl.")
    yield from enumerate(content, start=1)


def _decode(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers of thousands of digits, or too deep
        raise EmlocError(f"{where}: not valid JSON ({error}).", _correction(error)) from None


def _text(path: Path) -> Iterator[Numbered]:
    """Yield a row of text for every line that is not blank."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if text := line.decode("utf-8-sig").strip():
                    yield number, {"text": text}
    except UnicodeDecodeError as error:
        raise EmlocError(f"{path}, row {number}: not UTF-8 ({error}).", _correction(error)) from None


def _csv(path: Path) -> Iterator[Numbered]:
    """Yield rows of text cells: an empty cell is absent, and nothing becomes a number."""
    csv.field_size_limit(sys.maxsize)  # 128 KB otherwise
    number = 0
    try:
        with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            delimiter = _delimiter(file.readline(), _format(path))
            file.seek(0)
            for number, row in enumerate(csv.DictReader(file, delimiter=delimiter, strict=True), start=1):
                if None in row:
                    where = f"{path}, row {number}"
                    yield number, EmlocError(f"{where}: more cells than columns.", "Quote cells with delimiters.")
                else:
                    yield number, {name: cell or None for name, cell in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise EmlocError(f"{path}, row {number + 1}: not valid CSV ({error}).", _correction(error)) from None


def _correction(error: Exception) -> str:
    return "Save the file as UTF-8." if isinstance(error, UnicodeDecodeError) else "Correct it."


def _delimiter(header: str, suffix: str) -> str:
    """Return the delimiter of columns: a comma in .csv and a tab in .tsv, unless the header has more of another one.

    Spreadsheets write semicolons where the comma is the decimal separator.
    """
    usual = "\t" if suffix == ".tsv" else ","
    names = re.sub('"[^"]*"', "", header)
    return max((usual, ",", ";", "\t"), key=names.count)


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


#: Names of compressions, by suffix.
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
#: Readers by suffix.
READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _text, ".parquet": _parquet}
