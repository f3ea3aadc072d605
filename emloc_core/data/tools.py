"""Tools that a model may call, and its calls, in the one form that chat templates read: arguments as objects.

Files in OpenAI's form hold arguments as text in JSON; Arrow fills what an object lacks with nulls. So text becomes an
object, and nulls in objects are left out.
"""

import json
from typing import Any

from emloc_core.errors import EmlocError

_CALL = 'A call is {"type": "function", "function": {"name": ..., "arguments": {...}}}.'
_TOOLS = "`tools` is a list of functions in JSON schema, or that list as text."


def parse_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the tools of a row: a list of objects, given as such or as text in JSON."""
    found = _decoded(value, f"{where}: `tools`")
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise EmlocError(f"{where}: `tools` is not a list of objects.", _TOOLS)
    return [_without_nulls(tool) for tool in found]


def parse_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a message's tool calls: ``type``, ``function`` with ``name`` and ``arguments``, and ``id`` if given."""
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
        raise EmlocError(f"{where}: the arguments of {function['name']} are no object.", _CALL)
    named = {"id": str(call["id"])} if "id" in call else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": _without_nulls(arguments)}}


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
