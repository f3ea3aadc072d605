"""A model's answers to rows, without an adapter and with it."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from emloc_core.data.row import Row

#: Share of a plain text that is the prompt; the model continues it.
_SHARE = 0.3


def answers(base: str, adapter: Path, rows: Sequence[Row], max_new_tokens: int) -> list[dict[str, str]]:
    """Return every row's prompt and answer, and the base's answers without and with the adapter; imports torch."""
    from emloc_core.evaluation.conversation import open_conversation

    conversation = open_conversation(base, adapter, max_new_tokens=max_new_tokens, temperature=0.0)
    results = []
    for row in rows:
        record = {"prompt": _prompt(row), "expected": _expected(row)}
        for name, context in (("before", conversation.model.disable_adapter()), ("after", nullcontext())):
            with context:
                if isinstance(row.prompt, list):
                    record[name] = conversation.complete(row.prompt, row.images or (), row.tools)
                else:
                    record[name] = conversation.continue_text(_prompt(row))
        results.append(record)
    return results


def _prompt(row: Row) -> str:
    if row.text is not None:
        return row.text[: max(1, int(_SHARE * len(row.text)))]
    return _text_of(row.prompt)


def _expected(row: Row) -> str:
    return row.text[len(_prompt(row)) :] if row.text is not None else _text_of(row.completion)


def _text_of(content: Any) -> str:
    """Return the text of a prompt or an answer: in a conversation, its last message's text and tool calls."""
    if not isinstance(content, list):
        return str(content)
    last = content[-1].get("content") or ""
    text = last if isinstance(last, str) else " ".join(part["text"] for part in last if part.get("type") == "text")
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in content[-1].get("tool_calls", ())]
    return "\n".join(filter(None, [text, *calls]))
