"""The messages of a conversation, normalised to one form of TRL's conventions.

A message's content is a string; if it has images, it is a list of parts, ``{"type": "text", "text": ...}`` and
``{"type": "image"}``, in the images' order. So equal conversations are equal, however they were written.

Tools, and calls of them, get the one form that chat templates read: arguments as objects. Files in OpenAI's form hold
these as text in JSON; Arrow fills what an object lacks with nulls, which are left out.
"""

import json
from typing import Any

from emloc_core.errors import EmlocError

#: One turn: ``role`` and ``content``; an assistant's may have ``tool_calls``, a tool's ``name`` and ``tool_call_id``.
Message = dict[str, Any]
Content = str | list[Message]

IMAGE = {"type": "image"}
#: Placeholder for an image in the text of other row formats.
_MARK = "<image>"
#: Keys that a tool's message may have besides its content.
_OF_TOOLS = ("name", "tool_call_id")
#: ShareGPT's names of roles, which chat templates reject or take for a role of their own.
SHAREGPT = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant",
}  # fmt: skip
ROLES = "The roles are system, user, assistant and tool."
_PARTS = 'A part is {"type": "text", "text": ...} or {"type": "image"}; the images themselves go in `images`.'
_CALL = 'A call is {"type": "function", "function": {"name": ..., "arguments": {...}}}.'
_TOOLS = "`tools` is a list of functions in JSON schema, or that list as text."


def parse_content(value: Any, where: str) -> Content:
    """Return a string, or a list of messages.

    Raises:
        EmlocError: it is neither, or empty, or holds more than roles, text and image parts.
    """
    if not isinstance(value, list):
        return parse_string(value, where)
    if not value:
        raise EmlocError(f"{where} is empty.", "Fill it, or leave the row out.")
    return [_message(message, where) for message in value]


def place_images(prompt: list[Message], completion: list[Message], images: int, where: str) -> list[Message]:
    """Return the prompt with a part per image: if it has none, before the first user message, as TRL does.

    Raises:
        EmlocError: the image parts do not match the number of images, are in the completion, or are marked in a text.
    """
    if any(isinstance(message["content"], list) for message in completion):
        raise EmlocError(f"{where}: the answer contains an image.", "Put images into the question.")
    asked = [part for message in in_parts(prompt) if message["role"] == "user" for part in message["content"]]
    if images and any(_MARK in part.get("text", "") for part in asked):
        raise EmlocError(
            f"{where}: a user's text contains {_MARK}, which would be read as text in addition to the image.",
            'Replace it with a part {"type": "image"}, or remove it.',
        )
    parts = [part for message in prompt if isinstance(message["content"], list) for part in message["content"]]
    places = parts.count(IMAGE)
    first = next((index for index, message in enumerate(prompt) if message["role"] == "user"), None)
    if images and not places and first is not None:
        question = {"type": "text", "text": prompt[first]["content"]}
        with_images = prompt[first] | {"content": [*(dict(IMAGE) for _ in range(images)), question]}
        return [*prompt[:first], with_images, *prompt[first + 1 :]]
    if places != images:
        raise EmlocError(
            f"{where}: the messages have {places} image parts, but there are {images} images.",
            'Write one part {"type": "image"} per image, or none: images then go before the first user message.',
        )
    return prompt


def in_parts(messages: list[Message]) -> list[Message]:
    """Return the messages with all contents as lists of parts, as TRL passes them to a processor."""
    return [
        message
        if isinstance(message["content"], list)
        else message | {"content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def parse_string(value: Any, where: str, *, may_be_blank: bool = False) -> str:
    """Return a string that is valid Unicode and, unless ``may_be_blank``, not blank.

    Raises:
        EmlocError: it is not.
    """
    if not isinstance(value, str):
        raise EmlocError(f"{where} is not a string but {type(value).__name__}.", "See the forms of rows in the docs.")
    if not value.strip() and not may_be_blank:
        raise EmlocError(f"{where} is empty.", "Fill it, or leave the row out.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EmlocError(f"{where} is not valid Unicode ({error.reason}).", "Correct it.") from None
    return value


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise EmlocError(f"{where} has a message that is not an object.", "A message is a role and a content.")
    fields = {name: part for name, part in value.items() if part is not None}
    role = parse_string(fields.pop("role", None), f"{where}: a message's role")
    if role in SHAREGPT:
        raise EmlocError(f"{where} has a message of the {role}, which is called {SHAREGPT[role]} here.", ROLES)
    content, label = fields.pop("content", None), f"{where}: a message's content"
    more: Message = {}
    if role == "assistant" and fields.get("tool_calls"):
        more["tool_calls"] = parse_calls(fields.pop("tool_calls"), where)
    if role == "tool":
        more = {name: parse_string(fields.pop(name), f"{where}: `{name}`") for name in _OF_TOOLS if name in fields}
    if unknown := sorted(name for name, part in fields.items() if part != []):  # without, it is another conversation
        raise EmlocError(
            f"{where} has a message of the {role} with {unknown}.",
            "A message has role and content; an assistant's also tool_calls, a tool's also name and tool_call_id.",
        )
    if isinstance(content, list):
        parts = [_part(part, label) for part in content]
        if IMAGE in parts:
            return {"role": role, "content": parts, **more}
        content = "".join(part["text"] for part in parts)
    may_be_blank = role == "tool" or "tool_calls" in more
    content = "" if content is None and may_be_blank else content
    return {"role": role, "content": parse_string(content, label, may_be_blank=may_be_blank), **more}


def _part(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise EmlocError(f"{where} has a part that is not an object.", _PARTS)
    part = {name: content for name, content in value.items() if content is not None}  # Arrow's, for absent ones
    if part == IMAGE:
        return part
    if part.keys() != {"type", "text"} or part["type"] != "text":
        raise EmlocError(f"{where} has a part with {sorted(part)} of type {part.get('type')!r}.", _PARTS)
    return {"type": "text", "text": parse_string(part["text"], f"{where}: a part's text", may_be_blank=True)}


def parse_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the tools of a row: a list of objects, given as such or as text in JSON.

    Raises:
        EmlocError: it is something else.
    """
    tools = _decoded(value, f"{where}: `tools`")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise EmlocError(f"{where}: `tools` is not a list of objects.", _TOOLS)
    return [_without_nulls(tool) for tool in tools]


def parse_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a message's tool calls: ``type``, ``function`` with ``name`` and ``arguments``, and ``id`` if given.

    Raises:
        EmlocError: it is no list of calls.
    """
    calls = _decoded(value, f"{where}: `tool_calls`")
    if not isinstance(calls, list):
        raise EmlocError(f"{where}: `tool_calls` is {type(calls).__name__}, not a list.", _CALL)
    return [_call(call, where) for call in calls]


def _call(value: Any, where: str) -> dict[str, Any]:
    call = _without_nulls(value)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise EmlocError(f"{where} has a tool call without the name of a function.", _CALL)
    arguments = _decoded(function.get("arguments", {}), f"{where}: the arguments of {function['name']}")
    if not isinstance(arguments, dict):
        raise EmlocError(f"{where}: the arguments of {function['name']} are not an object.", _CALL)
    ident = {"id": str(call["id"])} if "id" in call else {}
    return {**ident, "type": "function", "function": {"name": function["name"], "arguments": _without_nulls(arguments)}}


def _decoded(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise EmlocError(f"{where}: not valid JSON ({error}).", "Correct it.") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
