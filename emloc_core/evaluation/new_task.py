"""Writes a task file for the user's own rows, from one template per kind."""

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from emloc_core.data.columns import known_columns
from emloc_core.data.files import read_file
from emloc_core.data.row import Row
from emloc_core.data.rows import load_rows, write_rows
from emloc_core.errors import EmlocError
from emloc_core.evaluation.images import PLACEHOLDER, read_table

#: Kinds of task for rows with images; each uses the template of a kind for text.
IMAGE_KINDS = {"image_choice": "choice", "image_nll": "completion_nll", "image_question": "generation"}
#: All kinds of task.
KINDS = ("choice", "completion_nll", "generation", *IMAGE_KINDS, "rolling_perplexity")
#: Most different answers of a choice task.
MOST_CHOICES = 20
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def write_task(kind: str, data: Path, output: Path) -> Path:
    """Write a task file of ``kind`` that reads ``data``, and return its path.

    Args:
        data: rows that :func:`load_rows` reads. Rows that lm-eval reads differently (CSV, saved datasets, columns of
            other tools than TRL, texts in parts) are copied beside ``output``, as JSONL.
        output: the YAML file to write; the path of the data is relative to it.

    Raises:
        EmlocError: the kind cannot use rows of this form, or ``output`` exists.
    """
    if output.exists():
        raise EmlocError(f"{output} already exists.", "Choose another file, or remove this one.", code="exists")
    rows = load_rows(str(data))
    as_it_is = data.suffix in _FORMATS and known_columns(_first(data)) == "TRL"
    if as_it_is and (kind in IMAGE_KINDS or not any(_has_parts(content) for _, content in read_file(data))):
        return _write(kind, rows, data, output)
    data = output.with_suffix(".jsonl")
    if data.exists():
        raise EmlocError(f"{data} already exists, and the rows would be copied there.", "Choose another output.",
                         code="exists")  # fmt: skip
    data.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_rows(data, rows)
        return _write(kind, rows, data, output)
    except BaseException:
        data.unlink(missing_ok=True)  # it would be in the way of the next try
        raise


def _write(kind: str, rows: list[Row], data: Path, output: Path) -> Path:
    _check_images(kind, rows, data)
    text, prompt, answer, system = _expressions(rows, data)
    messages_column = _messages_column(rows, answer, data)
    template, column = IMAGE_KINDS.get(kind, kind), ""
    if kind in IMAGE_KINDS:
        column, prompt, answer, system = _with_images(data, prompt, answer, system)
    values = {
        "NAME": re.sub(r"\W+", "_", output.stem) or kind,
        "FORMAT": _FORMATS[data.suffix],
        "DATA": _quoted(os.path.relpath(data.resolve(), output.resolve().parent)),
        "SYSTEM": _jinja("" if messages_column else system),
        "PROMPT": _quoted(messages_column) if messages_column else _jinja(prompt),
        "ANSWER": _jinja(answer),
        "TEXT": _jinja(text),
        "IMAGES": column,
    }
    needed, has = ("text", text) if kind == "rolling_perplexity" else ("prompt and completion", answer)
    if not has:
        raise EmlocError(
            f"{data} holds rows of {rows[0].form}, but a task of the kind {kind} needs {needed}.",
            "Choose another kind, or give other rows.",
        )
    if template == "choice":
        choices = _choices(rows, data)
        values["CHOICES"] = _quoted(choices)
        values["INDEX"] = _jinja(f"{_quoted(choices)}.index({answer})")
    content = files("emloc_core.evaluation").joinpath("templates", f"{template}.yaml").read_text("utf-8")
    if not column:
        content = re.sub(r"doc_to_image:.*\n", "", content)
    content = re.sub(r"@([A-Z]+)@", lambda match: values[match.group(1)], content)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(content, encoding="utf-8")
    return output


def _jinja(expression: str) -> str:
    """Return a Jinja expression as a YAML string."""
    return _quoted(f"{{{{ {expression} }}}}" if expression else "")


def _quoted(value: str | list[str]) -> str:
    """Return a literal that YAML and Jinja read alike: JSON, but with ``\\U`` for other characters than ASCII.

    JSON may write such a character in two halves, which neither of them joins.
    """
    literal = json.dumps(value, ensure_ascii=False)
    return re.sub("[^ -~]", lambda match: f"\\U{ord(match[0]):08x}", literal)


def _expressions(rows: list[Row], data: Path) -> tuple[str, str, str, str]:
    """Return Jinja expressions for the text, the prompt, the answer and the system prompt; "" if there is none."""
    first = rows[0]
    if first.form == "text":
        return "text", "", "", ""
    if first.form == "prompt and completion":
        return "prompt ~ completion", "prompt", "completion", ""
    columns = {name for name, value in _first(data).items() if value is not None}
    prompt, answer = ("prompt[-1]", "completion[-1]") if "completion" in columns else ("messages[-2]", "messages[-1]")
    start = prompt.replace("[-1]", "[0]").replace("[-2]", "[0]")
    return "", f"{prompt}.content", f"{answer}.content", f"{start}.content if {start}.role == 'system' else ''"


def _roles(row: Row) -> list[str]:
    """Return the roles of a conversation's messages, without a system message at its start."""
    roles = [turn["role"] for turn in [*(row.prompt or []), *(row.completion or [])] if isinstance(turn, dict)]
    return roles[1:] if roles[:1] == ["system"] else roles


def _messages_column(rows: list[Row], answer: str, data: Path) -> str:
    """Return the column of messages that is the whole question, if some rows have several turns or tools; else ""."""
    if rows[0].form != "conversation":
        return ""
    for row in rows:
        if isinstance(row.completion, list) and "tool_calls" in row.completion[-1]:
            raise EmlocError(
                f"{data}, row {row.number}: the answer is a tool call, and lm-eval compares text.", "Leave the row out."
            )
    several = next((row for row in rows if row.tools or _roles(row) != ["user", "assistant"]), None)
    if several is None:
        return ""
    if several.images is not None:
        raise EmlocError(
            f"{data}, row {several.number}: the turns are {', '.join(_roles(several))}.",
            "A task with images asks one question per row: keep one user turn and one answer, after an optional system "
            "turn.",
        )
    return "messages" if answer.startswith("messages") else "prompt"


def _check_images(kind: str, rows: list[Row], data: Path) -> None:
    has_images = any(row.images for row in rows)
    if has_images != (kind in IMAGE_KINDS):
        kinds = [name for name in KINDS if (name in IMAGE_KINDS) == has_images]
        raise EmlocError(
            f"{data} holds rows {'with' if has_images else 'without'} images, and {kind} is not a kind of task for "
            "them.",
            f"Choose one of: {', '.join(kinds)}.",
        )


def _with_images(data: Path, prompt: str, answer: str, system: str) -> tuple[str, str, str, str]:
    """Return the images' column, and the expressions with placeholders for the images in the prompt."""
    from datasets import Value

    table = read_table(data)
    column = "images" if "images" in table.column_names else "image"
    placed = f"'{PLACEHOLDER}' * {f'(({column} or []) | length)' if column == 'images' else f'(1 if {column} else 0)'}"
    if isinstance(table.features[prompt.partition("[")[0]].feature["content"], Value):  # strings, all of them
        return column, f"{placed} ~ {prompt}", answer, system
    parts = "{0} is string else {0} | map(attribute='text') | map('default', '{1}', true) | join"
    if system:
        start = system.partition(".")[0]
        text = parts.format(f"{start}.content", "")
        system = f"({start}.content if {text}) if {start}.role == 'system' else ''"
    prompt = f"{placed} ~ {prompt} if {parts.format(prompt, PLACEHOLDER)}"
    return column, prompt, f"({answer} if {parts.format(answer, '')})", system


def _first(data: Path) -> dict[str, Any]:
    """Return the first row of a file that :func:`load_rows` can read, as it is in the file."""
    return next(read_file(data))[1]


def _has_parts(content: dict[str, Any]) -> bool:
    """Return whether a row, as it is in the file, has a message whose content is a list of parts."""
    messages = [message for column in content.values() if isinstance(column, list) for message in column]
    return any(isinstance(message, dict) and isinstance(message.get("content"), list) for message in messages)


def _choices(rows: list[Row], data: Path) -> list[str]:
    answers = {row.completion if isinstance(row.completion, str) else row.completion[-1]["content"] for row in rows}  # type: ignore[index]
    if not 2 <= len(answers) <= MOST_CHOICES:
        raise EmlocError(
            f"{data} holds {len(answers)} different answers; a choice task takes 2 to {MOST_CHOICES}.",
            f"Choose {'generation or completion_nll' if rows[0].images is None else 'image_question or image_nll'}.",
        )
    return sorted(answers)
