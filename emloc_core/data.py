"""The user's rows, in TRL's conventions, and the disjoint sets that they are divided into.

A row is ``text``, ``prompt`` + ``completion`` (two strings, or two lists of messages) or ``messages``. ``messages``
become prompt and completion, so that the loss falls on the last answer alone: many chat templates have no marks for
generation, and TRL's ``assistant_only_loss`` needs them.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError

#: Files of an emulator that hold the rows which may never be tuned on.
CALIBRATION, SELECTION = "calibration.jsonl", "selection.jsonl"

#: One turn of a conversation: ``role`` and ``content``.
Message = dict[str, str]
Content = str | list[Message]

_FORMS = "Each row needs `text`, or `prompt` and `completion`, or `messages` that end in an assistant turn."
_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Row:
    """One example of the user's: either ``text``, or ``prompt`` and ``completion``, both strings or both messages.

    Attributes:
        number: the row's place in its source, from 1; the line in a JSONL file.
    """

    number: int
    text: str | None = None
    prompt: Content | None = None
    completion: Content | None = None

    @property
    def form(self) -> str:
        """Return ``text``, ``prompt and completion`` or ``conversation``."""
        if self.text is not None:
            return "text"
        return "prompt and completion" if isinstance(self.prompt, str) else "conversation"

    @cached_property
    def key(self) -> str:
        """Return the SHA-256 of the row's content, in hex: equal for equal content, wherever it stands."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the row as TRL's columns."""
        if self.text is not None:
            return {"text": self.text}
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Sets:
    """Rows for three purposes; no content stands in more than one of them."""

    calibration: list[Row]
    selection: list[Row]
    tuning: list[Row]


def load_rows(source: str, split: str = "train") -> list[Row]:
    """Read rows from a ``.jsonl``, ``.json`` (an array) or ``.parquet`` file, or from a data set of the hub.

    Columns other than those of the row's form are ignored; where several forms are complete, prompt and completion
    go before messages, and messages before text. All rows must be of one form.

    Args:
        source: path of the file, or id of the data set.
        split: which split of a data set of the hub; files have none.

    Raises:
        EmlocError: the source cannot be read, is empty, or a row is not of a known form; names file and row.
    """
    rows = [_parse(content, number, source) for number, content in _contents(source, split)]
    if not rows:
        raise EmlocError(f"{source} holds no rows.", _FORMS)
    for row in rows:
        if row.form != rows[0].form:
            raise EmlocError(
                f"{source}, row {row.number}: a row of {row.form}, where row {rows[0].number} is of {rows[0].form}.",
                "Keep one form a file.",
            )
    return rows


def draw(rows: Sequence[Row], seed: int, calibration: int, selection: int) -> Sets:
    """Divide rows by content into calibration, selection and tuning rows.

    What is drawn depends on the seed and the contents alone, not on the order of the rows. Calibration and selection
    rows are distinct; further copies of them are dropped, and copies of a tuning row are kept.

    Raises:
        EmlocError: there are fewer distinct rows than ``calibration + selection``.
    """
    copies: dict[str, list[Row]] = {}
    for row in rows:
        copies.setdefault(row.key, []).append(row)
    needed = calibration + selection
    if len(copies) < needed:
        raise EmlocError(
            f"There are {len(copies)} distinct rows, and {needed} are needed: "
            f"{calibration} for calibration and {selection} for selection.",
            "Give more rows, or ask for fewer.",
        )
    order = sorted(copies, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    return Sets(
        calibration=[copies[key][0] for key in order[:calibration]],
        selection=[copies[key][0] for key in order[calibration:needed]],
        tuning=[row for key in order[needed:] for row in copies[key]],
    )


def without(rows: Iterable[Row], files: Iterable[Path]) -> list[Row]:
    """Return the rows whose content stands in none of ``files``, in their order.

    Raises:
        EmlocError: a file cannot be read.
    """
    keys = {row.key for path in files for row in load_rows(str(path))}
    return [row for row in rows if row.key not in keys]


def digest(rows: Iterable[Row]) -> str:
    """Return the SHA-256, in hex, of the contents of ``rows`` in their order."""
    return hashlib.sha256("".join(row.key for row in rows).encode()).hexdigest()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL that :func:`load_rows` reads back."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)


def _contents(source: str, split: str) -> Iterator[tuple[int, Any]]:
    path = Path(source)
    if path.is_file():
        readers = dict(zip(_SUFFIXES, (_jsonl, _json, _parquet), strict=True))
        if path.suffix not in readers:
            raise EmlocError(f"{source} is none of {', '.join(_SUFFIXES)}.", "Convert it to one of these.")
        return readers[path.suffix](path)
    if path.is_dir():
        raise EmlocError(f"{source} is a directory.", f"Give one file: {', '.join(_SUFFIXES)}.")
    if path.suffix in _SUFFIXES or path.is_absolute():
        raise EmlocError(f"There is no file {source}.", "Check the path.")
    return _hub(source, split)


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:  # in bytes: str.splitlines would also break a line at U+2028 within a string
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _decode(line, f"{path}, row {number}")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    content = _decode(path.read_bytes(), str(path))
    if not isinstance(content, list):
        raise EmlocError(f"{path} is not an array of rows.", "Wrap the rows in [ ], or name the file .jsonl.")
    yield from enumerate(content, start=1)


def _decode(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EmlocError(f"{where}: not valid JSON ({error}).", "Correct it.") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise EmlocError(f"{path} cannot be read as Parquet ({error}).", "Make the file again.") from None
    yield from enumerate(table.to_pylist(), start=1)


def _hub(source: str, split: str) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    try:
        found = load_dataset(source, split=split)
    except ConnectionError as error:
        raise EmlocError(
            f"There is no file {source}, and the hub could not be reached to look for a data set of that name.",
            "Check the path, or the connection.",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise EmlocError(
            f"There is no file {source}, and no data set of that name could be loaded from the hub: {error}",
            "Check the path, or the data set's id and --split.",
        ) from error
    yield from enumerate(found, start=1)


def _parse(content: Any, number: int, source: str) -> Row:
    where = f"{source}, row {number}"
    if not isinstance(content, dict):
        raise EmlocError(f"{where}: not an object with columns but {type(content).__name__}.", _FORMS)
    has = {name for name, value in content.items() if value is not None}  # Arrow fills absent columns with None
    if has >= {"prompt", "completion"}:
        prompt, completion = (_content(content[name], f"{where}: `{name}`") for name in ("prompt", "completion"))
        if isinstance(prompt, str) != isinstance(completion, str):
            raise EmlocError(f"{where}: one of prompt and completion is a string, the other messages.", _FORMS)
        return Row(number, prompt=prompt, completion=completion)
    if "messages" in has:
        turns = _content(content["messages"], f"{where}: `messages`")
        if isinstance(turns, str):
            raise EmlocError(f"{where}: `messages` is a string, not a list of messages.", _FORMS)
        if turns[-1]["role"] != "assistant":
            raise EmlocError(f"{where}: `messages` do not end in an assistant turn, so there is no answer.", _FORMS)
        if len(turns) == 1:
            raise EmlocError(f"{where}: `messages` have nothing before the assistant turn.", _FORMS)
        return Row(number, prompt=turns[:-1], completion=turns[-1:])
    if "text" in has:
        return Row(number, text=_string(content["text"], f"{where}: `text`"))
    raise EmlocError(f"{where}: has the columns {sorted(has)}.", _FORMS)


def _content(value: Any, where: str) -> Content:
    if not isinstance(value, list):
        return _string(value, where)
    if not value:
        raise EmlocError(f"{where} is empty.", "Fill it, or leave the row out.")
    return [_message(message, where) for message in value]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise EmlocError(f"{where} has a message that is not an object.", "A message is a role and a content.")
    more = sorted(name for name, part in value.items() if part is not None and name not in ("role", "content"))
    if more:  # dropping tool calls, say, would silently train on another conversation
        raise EmlocError(f"{where} has a message with {more}.", "Only role and content are supported.")
    return {name: _string(value.get(name), f"{where}: a message's {name}") for name in ("role", "content")}


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise EmlocError(f"{where} is not a string but {type(value).__name__}.", _FORMS)
    if not value.strip():
        raise EmlocError(f"{where} is empty.", "Fill it, or leave the row out.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EmlocError(f"{where} is not valid Unicode ({error.reason}).", "Correct it.") from None
    return value
