"""The user's rows: parsed, left out by content, and written; :mod:`emloc_core.data.sources` reads them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from emloc_core.data.columns import known_columns
from emloc_core.data.images import Picture
from emloc_core.data.mixture import weighted, weights
from emloc_core.data.row import Row, parse_row
from emloc_core.data.sources import is_folder, no_rows, read_source
from emloc_core.errors import EmlocError, did_you_mean
from emloc_core.files.manifest import MANIFEST
from emloc_core.settings import Loss

#: Files of an emulator with rows that must never be tuned on.
CALIBRATION, SELECTION = "calibration.jsonl", "selection.jsonl"
#: File of an output with the rows that were left out.
SKIPPED = "skipped_rows.jsonl"

_CONVERSION = {"Alpaca": "instruction, input and output", "ShareGPT": "conversations"}
#: Columns that rows may have.
COLUMNS = (
    "text", "prompt", "completion", "chosen", "rejected", "label", "messages", "image", "images", "tools",
    "instruction", "input", "output", "system", "history", "conversations",
)  # fmt: skip
#: Every column has the name that TRL gives it.
NO_RENAMING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used: its source and number, and why."""

    source: str
    number: int
    why: str


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> None:
    """Write which rows were left out and why, one JSON object per line; nothing of what is in them."""
    lines = ({"source": Path(row.source).name, "row": row.number, "why": row.why} for row in skipped)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def told(skipped: Sequence[Skipped]) -> list[str]:
    """Return a warning of rows that are left out, if there are any."""
    if not skipped:
        return []
    first = f"the first is row {skipped[0].number} of {skipped[0].source}: {skipped[0].why}"
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
    a ``metadata.jsonl``, or a ``.txt`` beside each. Other columns than those of the row's form are ignored; if several
    forms are complete, prompt and completion take precedence over messages, these over ShareGPT's and Alpaca's columns,
    which become messages, and all over text. All rows must have the same form.

    Args:
        source: path of the file or directory, id of the dataset, or the rows themselves: mappings, as a
            ``datasets.Dataset`` yields them, or rows that were read before. Several sources: a list of them, or a
            mapping to their weights; see :func:`emloc_core.data.mixture.weighted`.
        split: split of a saved or hub dataset; files have none.
        loss: which answers of a conversation count.
        columns: names that the data have for columns, by the usual names: ``{"prompt": "question"}``. Rows without
            such a column are read as they are.
        skipped: takes the rows that cannot be used; None: the first of them is an error.

    Raises:
        EmlocError: the source cannot be read, is empty, or a row has no known form; names file and row.
    """
    _require_known(columns)
    rows = _load(source, split, columns, skipped)
    return [replace(row, loss=loss) for row in rows] if loss != "last" else rows


def _require_known(columns: Mapping[str, str]) -> None:
    """Refuse names for columns that rows cannot have.

    Args:
        columns: names that the data have, by those in :data:`COLUMNS`.
    """
    if unknown := [name for name in columns if name not in COLUMNS]:
        name = unknown[0]
        meant = f"{columns[name]}={name}" if columns[name] in COLUMNS else ""
        hint = f" Did you mean {meant}?" if meant else did_you_mean(name, list(COLUMNS))
        raise EmlocError(
            f"--columns {name}={columns[name]}: rows have no column {name!r}.{hint}",
            f"Give those of {', '.join(COLUMNS)} that you need, each with its name in your data.",
        )


def _load(source: Any, split: str, columns: Mapping[str, str], skipped: list[Skipped] | None) -> list[Row]:
    if isinstance(source, Mapping) and split in source and not isinstance(source[split], int | float):
        source = source[split]  # a DatasetDict
    elif isinstance(source, Mapping) and any(hasattr(each, "column_names") for each in source.values()):
        raise EmlocError(f"The data have no split {split!r}.", f"Give one of these: {', '.join(map(str, source))}.")
    if (mixture := weights(source)) is not None:
        parts = {name: [replace(row, source=name) for row in _load(name, split, columns, skipped)] for name in mixture}
        return _of_one_form("", [row for name, rows in parts.items() for row in weighted(rows, mixture[name])])
    directory = Path()
    if isinstance(source, str | Path):
        source, place = str(source), Path(source)
        contents = read_source(source, split)
        directory = place.parent if place.is_file() else place if is_folder(place) else Path()
    else:
        contents, source = enumerate(source, start=1), "the rows"
    # An emulator may come from someone else: it may only refer to its own images.
    confined = _is_kept(Path(source))
    return _of_one_form(source, list(_parsed(contents, source, directory, columns, skipped, confined=confined)))


def _parsed(
    contents: Iterable[tuple[int, Any]],
    source: str,
    directory: Path,
    columns: Mapping[str, str],
    skipped: list[Skipped] | None,
    *,
    confined: bool,
) -> Iterator[Row]:
    told = False
    for number, given in contents:
        if isinstance(given, Row):
            yield given
            continue
        where = f"{source}, row {number}"
        try:
            if isinstance(given, EmlocError):
                raise given
            content = renamed(given, where, columns)
            row = parse_row(content, where, number, directory, confined=confined)
        except EmlocError as error:
            if skipped is None:
                raise
            skipped.append(Skipped(source, number, error.args[0].removeprefix(f"{where}: ")))
            continue
        if not told and (known := known_columns(content)) in _CONVERSION:
            click.echo(f"emloc: {source}: {known}'s {_CONVERSION[known]} become messages", err=True)
            told = True
        yield row


def renamed(content: Any, where: str, columns: Mapping[str, str]) -> Any:
    """Return a row whose columns have the usual names; those that it lacks are left out.

    Args:
        content: the row's columns; anything else is returned as it is.
        where: its name in messages.
        columns: names that the data have, by the usual ones.

    Raises:
        EmlocError: it has neither a column of its own name nor one of the usual name.
    """
    if not columns or not isinstance(content, Mapping):
        return content
    found = {name: value for name, value in content.items() if name not in columns.values()}
    found |= {name: content[own] for name, own in columns.items() if own in content}
    if not columns.keys() & found.keys():
        raise EmlocError(
            f"{where}: has none of the columns {', '.join(columns.values())}, but {', '.join(map(str, content))}.",
            "Correct --columns.",
        )
    return found


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

    Args:
        files: files, or saved or hub datasets.
        split: of those datasets.
        columns: see :func:`load_rows`; what an emulator keeps has the usual ones.

    Raises:
        EmlocError: a file cannot be read.
    """
    some = [path for path in files if not path.is_file() or path.stat().st_size]

    def of(path: Path) -> Mapping[str, str]:
        return NO_RENAMING if _is_kept(path) else columns

    keys = {row.key for path in some for row in load_rows(str(path), split, columns=of(path))}
    return [row for row in rows if row.key not in keys]


def _is_kept(path: Path) -> bool:
    """Return whether a file holds rows that an emulator keeps."""
    return path.name in (CALIBRATION, SELECTION) and (path.parent / MANIFEST).is_file()


def digest(rows: Iterable[Row]) -> str:
    """Return the SHA-256, in hex, of the contents of ``rows`` in their order."""
    return hashlib.sha256("".join(row.key for row in rows).encode()).hexdigest()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL that :func:`load_rows` can read, and their images into a directory beside it.

    Raises:
        EmlocError: an image cannot be read.
    """

    def kept(picture: Picture) -> str:
        return picture.write(path.parent)

    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.to_dict(), ensure_ascii=False, default=kept) + "\n" for row in rows)
