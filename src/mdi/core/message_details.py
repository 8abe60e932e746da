"""Fields of a message beside its role and content that chat templates read: names, reasoning and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mdi.core.errors import InputError
from mdi.core.values import checked_json, checked_text

DETAILS = ("name", "reasoning_content", "tool_call_id", "tool_calls", "function_call")

NEWER_REASONING = "reasoning"  # another name of reasoning_content


def read_details(message: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The fields of `DETAILS` that say something. Raises InputError, naming the field, for what is none."""
    details: dict[str, Any] = {}
    for name in DETAILS:
        value, place = message.get(name), f"{path}.{name}"
        if name == "reasoning_content" and value is None and isinstance(message.get(NEWER_REASONING), str):
            value, place = message[NEWER_REASONING], f"{path}.{NEWER_REASONING}"
        if value is None or value == []:
            continue
        if name == "tool_calls":
            details[name] = _tool_calls(value, place)
        elif name == "function_call":
            details[name] = _function(value, place)
        elif isinstance(value, str):
            details[name] = checked_text(value, place)
        else:
            raise InputError(f"{place} must be a string", place)
    return details


def _tool_calls(calls: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise InputError(f"{path} must be a list of calls", path)
    return [
        {
            **checked_json(call, f"{path}[{index}]"),
            "function": _function(call.get("function"), f"{path}[{index}].function"),
        }
        for index, call in enumerate(calls)
    ]


def _function(function: Any, path: str) -> dict[str, Any]:
    """A call as chat templates read it: OpenAI's arguments are a text, which templates write as JSON themselves."""
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{path} must have a name, and arguments", path)
    call: dict[str, Any] = checked_json(function, path)
    if isinstance(arguments := call.get("arguments"), str):
        try:
            read = json.loads(arguments)
        except (ValueError, RecursionError):
            read = None
        call["arguments"] = checked_json(read, f"{path}.arguments") if isinstance(read, dict) else arguments
    return call
