"""The user's rows in TRL's conventions: what a row is, and how a source's rows are parsed.

A row is ``text``, ``prompt`` + ``completion`` (two strings, or two lists of messages) or ``messages``. ``messages``
become prompt and completion: the last answer. Whether the answers before it count in the loss too is the row's
``loss``, which is no part of its content. A conversation may have ``images`` and ``tools``.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from emloc_core.data.columns import as_trl, known_columns, renamed, require_known
from emloc_core.data.images import Picture
from emloc_core.data.messages import ROLES, Content, parse_content, parse_string, parse_tools, place_images
from emloc_core.errors import EmlocError
from emloc_core.settings import Loss

#: What a row may be, in messages.
FORMS = (
    "Each row needs `text`, or `prompt` and `completion` (or `chosen` and `rejected`), or `messages` that end in an "
    "assistant turn; to learn pictures, `prompt` and `image`."
)
_HERE = Path()
#: Columns of other tools that become messages.
_CONVERSION = {"Alpaca": "instruction, input and output", "ShareGPT": "conversations"}


@dataclass(frozen=True)
class Row:
    """One example: ``text``; ``prompt`` and ``completion``, both strings or both messages; or a picture and its prompt.

    Attributes:
        number: position of the row in its source, from 1; the line in a JSONL file.
        images: images of a conversation, in the order of their parts in the prompt. None if no row of the source has
            any: such rows are tokenized as text, and others by the model's processor, as in TRL.
        tools: the tools that a conversation may call, as functions in JSON schema.
        loss: which of a conversation's answers count: the last one, or all.
        source: its file or dataset, if there are several.
        rejected: of a preference, the answer that ``completion`` is preferred to.
        label: whether the completion is wanted, where the row says so.
        weight: weight of a picture in the loss.
    """

    number: int
    text: str | None = None
    prompt: Content | None = None
    completion: Content | None = None
    images: tuple[Picture, ...] | None = None
    tools: list[dict[str, Any]] | None = None
    loss: Loss = "last"
    source: str = field(default="", compare=False)
    rejected: Content | None = None
    label: bool | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Return how messages call the row."""
        return f"Row {self.number} of {self.source}" if self.source else f"Row {self.number}"

    @property
    def form(self) -> str:
        """Return ``text``, ``prompt and completion``, ``conversation``, or ``picture``: a prompt and its image."""
        if self.text is not None:
            return "text"
        if self.completion is None:
            return "picture"
        return "prompt and completion" if isinstance(self.prompt, str) else "conversation"

    def answers(self) -> tuple["Row", ...]:
        """Return the row once per answer: with its own and, for a preference, also with the rejected one."""
        if self.rejected is None:
            return (self,)
        chosen = replace(self, rejected=None, label=True)
        return chosen, replace(chosen, completion=self.rejected, label=False)

    @cached_property
    def key(self) -> str:
        """Return the SHA-256 of the row's content, in hex, independent of its position."""
        columns = {name: column for name, column in self.to_dict().items() if column != []}
        canonical = json.dumps(columns, sort_keys=True, separators=(",", ":"), default=lambda picture: picture.sha256)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the row as TRL's columns; images as :class:`Picture`."""
        if self.text is not None:
            return {"text": self.text}
        if self.form == "picture":
            assert self.images
            return {"prompt": self.prompt, "image": self.images[0], "weight": self.weight}
        images = {} if self.images is None else {"images": list(self.images)}
        tools = {} if self.tools is None else {"tools": self.tools}
        rejected = {} if self.rejected is None else {"rejected": self.rejected}
        label = {} if self.label is None else {"label": self.label}
        return {"prompt": self.prompt, "completion": self.completion, **rejected, **label, **tools, **images}


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used: its source and number, and the reason."""

    source: str
    number: int
    reason: str


def parse_rows(
    contents: Iterable[tuple[int, Any]],
    source: str,
    columns: Mapping[str, str],
    skipped: list[Skipped] | None,
    directory: Path = _HERE,
    *,
    confined: bool = False,
) -> Iterator[Row]:
    """Yield the rows of a source.

    Args:
        contents: their numbers and columns, or why a row cannot be read; or rows that were read before.
        source: its name in messages.
        directory, confined: see :func:`parse_row`.
        columns, skipped: see :func:`emloc_core.data.rows.load_rows`.

    Raises:
        EmlocError: a row has no known form, and ``skipped`` is None; or rows cannot have such columns.
    """
    require_known(columns)
    announced = False
    for number, raw in contents:
        if isinstance(raw, Row):
            yield raw
            continue
        where = f"{source}, row {number}"
        try:
            if isinstance(raw, EmlocError):
                raise raw
            content = renamed(raw, where, columns)
            row = parse_row(content, where, number, directory, confined=confined)
        except EmlocError as error:
            if skipped is None:
                raise
            skipped.append(Skipped(source, number, error.args[0].removeprefix(f"{where}: ")))
            continue
        if not announced and (tool := known_columns(content)) in _CONVERSION:
            click.echo(f"emloc: {source}: {tool}'s {_CONVERSION[tool]} become messages", err=True)
            announced = True
        yield row


def parse_row(content: Any, where: str, number: int, directory: Path = _HERE, *, confined: bool = False) -> Row:
    """Return one row.

    Args:
        where: its name in messages.
        directory: what paths of images are relative to.
        confined: whether images must lie within that directory.

    Raises:
        EmlocError: it has no known form.
    """
    if not isinstance(content, dict):
        raise EmlocError(f"{where}: {type(content).__name__}, not an object with columns.", FORMS)
    content = as_trl(content, where)
    has = {name for name, value in content.items() if value is not None}  # Arrow fills absent columns with None
    answer = "completion" if "completion" in has else "chosen"  # of a preference
    if has >= {"prompt", answer}:
        prompt, completion = (parse_content(content[name], f"{where}: `{name}`") for name in ("prompt", answer))
        if isinstance(prompt, str) != isinstance(completion, str):
            raise EmlocError(f"{where}: one of prompt and completion is a string, the other a list of messages.", FORMS)
        rejected = _rejected(content, completion, where)
        label = content.get("label")  # other tools use this name for something else than KTO does
        row = Row(
            number, prompt=prompt, completion=completion, rejected=rejected,
            label=label if isinstance(label, bool) and rejected is None else None,
        )  # fmt: skip
    elif "messages" in has:
        turns = parse_content(content["messages"], f"{where}: `messages`")
        if isinstance(turns, str):
            raise EmlocError(f"{where}: `messages` is a string, not a list of messages.", FORMS)
        if turns[-1]["role"] != "assistant":
            other = f"does not end with an assistant turn but with one of the {turns[-1]['role']}"
            raise EmlocError(f"{where}: `messages` {other}, so there is no answer.", f"{ROLES} {FORMS}")
        if len(turns) == 1:
            raise EmlocError(f"{where}: `messages` has nothing before the assistant turn.", FORMS)
        row = Row(number, prompt=turns[:-1], completion=turns[-1:])
    elif has >= {"prompt", "image"}:
        weight = _weight(content.get("weight"), where)
        prompt = parse_string(content["prompt"], f"{where}: `prompt`")
        images = _pictures(content, where, directory, confined=confined)
        return Row(number, prompt=prompt, images=images, weight=weight)
    elif "text" in has:
        row = Row(number, text=parse_string(content["text"], f"{where}: `text`"))
    else:
        fix = f"{FORMS} Rename columns with --columns prompt=NAME,completion=NAME."
        raise EmlocError(f"{where}: has the columns {sorted(has)}.", fix)
    row = _with_images(row, _pictures(content, where, directory, confined=confined), where)
    return replace(row, tools=_tools(content["tools"], row, where)) if "tools" in has else row


def _weight(value: Any, where: str) -> float:
    """Return a weight as a number (CSV has text); 1 if the row has none."""
    try:
        weight = 1.0 if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = float("nan")
    if isinstance(value, bool) or not 0 < weight < float("inf"):
        raise EmlocError(f"{where}: `weight` is {value!r}, not a number above 0.", "Correct it, or leave it out.")
    return weight


def _rejected(content: dict[str, Any], chosen: Content, where: str) -> Content | None:
    if content.get("rejected") is None:
        return None
    rejected = parse_content(content["rejected"], f"{where}: `rejected`")
    if isinstance(rejected, str) != isinstance(chosen, str):
        raise EmlocError(f"{where}: one of chosen and rejected is a string, the other a list of messages.", FORMS)
    return rejected


def _tools(value: Any, row: Row, where: str) -> list[dict[str, Any]] | None:
    tools = parse_tools(value, where)
    if tools and row.form != "conversation":
        raise EmlocError(f"{where}: a row of {row.form} has tools.", "Write rows with tools as `messages`.")
    if tools and row.images:
        raise EmlocError(f"{where}: a row has both tools and images.", "Leave one of them out.", code="unsupported")
    return tools or None


def _pictures(content: dict[str, Any], where: str, directory: Path, *, confined: bool) -> tuple[Picture, ...] | None:
    image, images = content.get("image"), content.get("images")
    if image is None and images is None:
        return None
    if image is not None and images is not None:
        raise EmlocError(f"{where}: has both `image` and `images`.", "Keep `images`, a list.")
    sources = [image] if images is None else images
    if not isinstance(sources, list):
        raise EmlocError(f"{where}: `images` is {type(sources).__name__}, not a list.", "Name a single image `image`.")
    try:
        return tuple(Picture.from_source(source, directory, confined=confined) for source in sources)
    except EmlocError as error:
        raise EmlocError(f"{where}: {error.args[0]}", error.fix, code=error.code) from None


def _with_images(row: Row, images: tuple[Picture, ...] | None, where: str) -> Row:
    if isinstance(row.prompt, list) and isinstance(row.completion, list):
        return replace(row, prompt=place_images(row.prompt, row.completion, len(images or ()), where), images=images)
    if images:
        raise EmlocError(
            f"{where}: a row of {row.form} has images.", "Write rows with images as `messages`, or as a `prompt` and a "
            "`completion` that are lists of messages.",
        )  # fmt: skip
    return row
