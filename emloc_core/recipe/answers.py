"""The answers to a few rows before tuning and after it, side by side."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from emloc_core.data.row import Row
from emloc_core.data.rows import load_rows
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.manifest import MANIFEST
from emloc_core.processes.call import call

#: The file of the answers, beside the stages' directories.
FILE = "answers.json"
#: Share of a row of text alone that the model is to continue.
_SHARE = 0.3


def answers_of(
    base: str, adapter: Path, rows: str, max_new_tokens: int, log: Path | None = None
) -> list[dict[str, str]]:
    """Return the answers of the base and of the base with an adapter; those that are there are not made again.

    They are kept beside the adapter's directory, in a process of their own.

    Args:
        base: the model.
        adapter: directory of the adapter.
        rows: file of rows.
        max_new_tokens: most tokens per answer.
        log: file for what that process writes; by default it goes to stderr.

    Raises:
        EmlocError: the model, the adapter or the rows cannot be used.
    """
    file = adapter.parent / FILE
    asked = {"adapter": read_json(adapter / MANIFEST)["request"], "rows": rows, "max_new_tokens": max_new_tokens}
    known = read_json(file) if file.is_file() else {}
    if known.get("asked") != asked:
        given = {"base": base, "adapter": str(adapter), "rows": rows, "max_new_tokens": max_new_tokens}
        (found,) = call(f"{__name__}:answers", given, log=log)
        known = {"asked": asked, "answers": found}
        write_json(file, known)
    answers: list[dict[str, str]] = known["answers"]
    return answers


def answers(base: str, adapter: str, rows: str, max_new_tokens: int) -> list[dict[str, str]]:
    """Return the row's prompt and answer, and what the base answers without and with the adapter; imports torch."""
    from emloc_core.evaluation.conversation import open_conversation

    conversation = open_conversation(base, Path(adapter), max_new_tokens=max_new_tokens, temperature=0.0)
    found = []
    for row in load_rows(rows):
        told = {"prompt": _prompt(row), "expected": _expected(row)}
        for name, context in (("before", conversation.model.disable_adapter()), ("after", nullcontext())):
            with context:
                if isinstance(row.prompt, list):
                    told[name] = conversation.complete(row.prompt, row.images or ())
                else:
                    told[name] = conversation.continue_text(_prompt(row))
        found.append(told)
    return found


def _prompt(row: Row) -> str:
    if row.text is not None:
        return row.text[: max(1, int(_SHARE * len(row.text)))]
    return _said(row.prompt)


def _expected(row: Row) -> str:
    return row.text[len(_prompt(row)) :] if row.text is not None else _said(row.completion)


def _said(content: Any) -> str:
    """Return the text of a prompt or an answer: of a conversation, that of its last message."""
    if not isinstance(content, list):
        return str(content)
    last = content[-1].get("content") or ""
    return last if isinstance(last, str) else " ".join(part["text"] for part in last if part.get("type") == "text")
