"""Columns of rows: the user's names for them, and other tools' columns (Alpaca's, ShareGPT's) converted to TRL's."""

import re
from collections.abc import Mapping
from typing import Any

from emloc_core.data.messages import IMAGE, SHAREGPT
from emloc_core.errors import EmlocError, did_you_mean

#: Columns that rows may have.
COLUMNS = (
    "text", "prompt", "completion", "chosen", "rejected", "label", "messages", "image", "images", "weight", "tools",
    "instruction", "input", "output", "system", "history", "conversations",
)  # fmt: skip
#: Columns that some rows may lack where others have them.
_OPTIONAL = {"image", "images", "weight", "tools", "input", "system", "history"}
#: Every column has the name that TRL gives it.
NO_RENAMING: Mapping[str, str] = {}
#: Roles by their names in ShareGPT's rows. ``function_call`` and ``observation`` are LLaMA-Factory's.
_ROLES = SHAREGPT | {
    "user": "user", "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_call": "assistant",
}  # fmt: skip
#: Where ShareGPT's texts have an image, as in LLaVA's data.
_MARK = re.compile(r"\s*<image>\s*")
_TURN = 'A turn is {"from": "human" or "gpt", "value": ...}.'


def require_known(columns: Mapping[str, str]) -> None:
    """Refuse names for columns that rows cannot have.

    Args:
        columns: names that the data have, by those in :data:`COLUMNS`.
    """
    if unknown := [name for name in columns if name not in COLUMNS]:
        name = unknown[0]
        swapped = f"{columns[name]}={name}" if columns[name] in COLUMNS else ""
        hint = f" Did you mean {swapped}?" if swapped else did_you_mean(name, list(COLUMNS))
        raise EmlocError(
            f"--columns {name}={columns[name]}: rows have no column {name!r}.{hint}",
            f"Give those of {', '.join(COLUMNS)} that you need, each with its name in your data.",
        )


def renamed(content: Any, where: str, columns: Mapping[str, str]) -> Any:
    """Return a row whose columns have the usual names; optional columns that it lacks are left out.

    A row that has the usual names already is returned unchanged: rows that EMLoC wrote are read with user's names, too.

    Args:
        content: the row's columns; anything else is returned unchanged.
        where: its name in messages.
        columns: names that the data have, by the usual ones.

    Raises:
        EmlocError: it lacks another column, or all of them, by its own name and the usual one.
    """
    if not columns or not isinstance(content, Mapping):
        return content
    if not content.keys() & set(columns.values()) and known_columns({**content, "text": None}):  # some have a text, too
        return content
    cells = {name: value for name, value in content.items() if name not in columns.values()}
    cells |= {name: content[own] for name, own in columns.items() if own in content}
    lacking = columns.keys() - cells.keys()
    if lacking == columns.keys() or lacking - _OPTIONAL:
        missing = ", ".join(own for name, own in columns.items() if name in lacking)
        raise EmlocError(
            f"{where}: has no column {missing}; it has {', '.join(map(str, content))}.", "Correct --columns."
        )
    return cells


def known_columns(content: Mapping[str, Any]) -> str:
    """Return which tool's columns a row has: ``TRL``, ``ShareGPT`` or ``Alpaca``; "" if none are complete.

    TRL's conversations and prompts come first, then the others; a text comes last, since some files also hold each
    row as one text.
    """
    has = {name for name, value in content.items() if value is not None}  # Arrow fills absent columns with None
    if has >= {"prompt", "completion"} or "messages" in has:
        return "TRL"
    if "conversations" in has:
        return "ShareGPT"
    if has >= {"instruction", "output"}:
        return "Alpaca"
    return "TRL" if "text" in has else ""


def as_trl(content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a row in TRL's columns.

    Raises:
        EmlocError: a row in ShareGPT's or Alpaca's columns is not as it should be.
    """
    columns = known_columns(content)
    if columns not in _CONVERTED:
        return _with_prompt(content)
    others = {name: content[name] for name in ("image", "images", "tools") if content.get(name) is not None}
    return {"messages": _CONVERTED[columns](content, where), **others}


def _with_prompt(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a preference with the prompt that its answers begin with, as TRL takes it where they have one in common.

    Some files also have the question as text, beside conversations that begin with it.
    """
    chosen: Any = content.get("chosen")
    rejected: Any = content.get("rejected")
    kinds, prompt = {type(chosen), type(rejected)}, content.get("prompt")
    if kinds not in ({list}, {str}) or isinstance(prompt, list) or (prompt is not None and kinds == {str}):
        return content
    pairs: Any = zip(chosen, rejected, strict=False)
    shared = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if shared is None:  # one begins with the other: its last message, or its whole text, is the answer
        shared = min(len(chosen), len(rejected)) - 1 if kinds == {list} else 0
    if kinds == {str} and chosen[shared - 1 : shared] == " ":
        shared -= 1  # tokens begin with a space
    if shared < 1:
        return content
    return {**content, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _alpaca(content: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    history = content.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise EmlocError(f"{where}: `history` is not a list of question-answer pairs.", "Correct it.")
    instruction, context = content["instruction"], content.get("input")
    prompt = f"{instruction}\n{context}" if context else instruction
    messages = [{"role": "system", "content": content["system"]}] if content.get("system") else []
    for question, answer in [*history, (prompt, content["output"])]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _sharegpt(content: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    turns = content["conversations"]
    if not isinstance(turns, list):
        raise EmlocError(f"{where}: `conversations` is {type(turns).__name__}, not a list of turns.", _TURN)
    messages = [{"role": "system", "content": content["system"]}] if content.get("system") else []
    return messages + [_turn(turn, where) for turn in turns]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise EmlocError(f"{where}: `conversations` has a turn that is not an object.", _TURN)
    if turn.get("role") is not None:  # the turns are messages already
        return turn
    name, value = turn.get("from"), turn.get("value")
    if name not in _ROLES:
        raise EmlocError(f"{where}: `conversations` has a turn from {name!r}.", f"Known are {', '.join(_ROLES)}.")
    if name == "function_call":
        is_single = isinstance(value, str) and not value.lstrip().startswith("[")
        return {"role": "assistant", "content": "", "tool_calls": f"[{value}]" if is_single else value}
    if isinstance(value, str) and "<image>" in value and name in ("human", "user"):
        return {"role": "user", "content": _parts(value)}
    return {"role": _ROLES[name], "content": value}


def _parts(text: str) -> list[dict[str, Any]]:
    """Return a text with marks for images as parts of a message."""
    first, *others = _MARK.split(text)
    parts = [{"type": "text", "text": first}] if first else []
    for other in others:
        parts += [dict(IMAGE), {"type": "text", "text": other}] if other else [dict(IMAGE)]
    return parts


_CONVERTED = {"ShareGPT": _sharegpt, "Alpaca": _alpaca}
