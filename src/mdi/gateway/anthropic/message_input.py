"""Anthropic's messages, with their blocks, as messages in the chat form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mdi.core.errors import InputError
from mdi.core.unknown_fields import UnknownField

Block = Mapping[str, Any]

BLOCK_FIELDS: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "citations"),
    "image": ("source", "transformations"),
    "tool_use": ("id", "name", "input", "caller", "toolset_name"),
    "tool_result": ("tool_use_id", "content", "is_error", "toolset_name"),
    "thinking": ("thinking", "signature"),
    "redacted_thinking": ("data",),
}
"""The types of blocks that are read, and their fields. `cache_control`, of every type, changes nothing."""

ALLOWED: Mapping[str, tuple[str, ...]] = {
    "user": ("text", "image", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
    "tool_result": ("text", "image"),
}
"""The types of blocks that a message of each role has, and a tool's result."""


class ChatMessages:
    """Messages in the chat form, made of Anthropic's.

    names: the places of messages, and of what is in them, as the caller named them. unknown: called with the path of
    each unknown field.
    """

    def __init__(self, unknown: UnknownField) -> None:
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}
        self._unknown = unknown

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message, which is the assistant's own."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def add_system(self, system: str | Sequence[Any]) -> None:
        """Adds the system prompt."""
        texts = [block["text"] for block, _ in self._blocks(system, "system", "system")]
        self._add({"role": "system", "content": "\n".join(texts)}, "system")

    def add(self, message: Any, place: str) -> None:
        """Adds a message. Raises InputError, naming the place, for what is none."""
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or role not in ("user", "assistant", "system"):
            raise InputError(f"{place} must have the role user or assistant, and a content", f"{place}.role")
        for name in message:
            if name not in ("role", "content"):
                self._unknown(f"{place}.{name}")
        blocks = self._blocks(message.get("content"), f"{place}.content", role)
        if role == "user":
            self._add_user(blocks, place)
        elif role == "assistant":
            self._add_assistant(blocks, place)
        else:
            self._add({"role": "system", "content": "\n".join(block["text"] for block, _ in blocks)}, place)

    def _add(self, message: dict[str, Any], place: str) -> str:
        at = f"messages[{len(self.messages)}]"
        self.names[at] = place
        self.messages.append(message)
        return at

    def _add_user(self, blocks: Sequence[tuple[Block, str]], place: str) -> None:
        """Results of tools are messages of their own, in the order of the blocks."""
        parts: list[tuple[dict[str, Any], str]] = []
        for block, at in blocks:
            if block["type"] == "tool_result":
                self._add_parts(parts, place)
                parts = []
                self._add_result(block, at)
            else:
                parts.append((_part(block, at), at))
        self._add_parts(parts, place)

    def _add_parts(self, parts: Sequence[tuple[dict[str, Any], str]], place: str) -> None:
        if parts:
            self._add_content({"role": "user"}, parts, place)

    def _add_content(self, message: dict[str, Any], parts: Sequence[tuple[dict[str, Any], str]], place: str) -> None:
        """Adds a message of parts, of which one text alone is its content."""
        content: Any = [part for part, _ in parts]
        if len(content) == 1 and content[0]["type"] == "text":
            content = content[0]["text"]
        at = self._add(message | {"content": content}, place)
        self.names |= {f"{at}.content[{index}]": own for index, (_, own) in enumerate(parts)}

    def _add_result(self, block: Block, place: str) -> None:
        content = [(_part(part, at), at) for part, at in self._result_blocks(block, place)]
        self._add_content({"role": "tool", "tool_call_id": _text(block, "tool_use_id", place)}, content, place)

    def _result_blocks(self, block: Block, place: str) -> list[tuple[Block, str]]:
        given = block.get("content")
        return [] if given in (None, "", []) else self._blocks(given, f"{place}.content", "tool_result")

    def _add_assistant(self, blocks: Sequence[tuple[Block, str]], place: str) -> None:
        texts = [block["text"] for block, _ in blocks if block["type"] == "text"]
        thoughts = [_text(block, "thinking", at) for block, at in blocks if block["type"] == "thinking"]
        calls = [(_call(block, at), at) for block, at in blocks if block["type"] == "tool_use"]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        if thoughts:
            message["reasoning_content"] = "\n".join(thoughts)
        if calls:
            message["tool_calls"] = [call for call, _ in calls]
        at = self._add(message, place)
        for index, (_, own) in enumerate(calls):
            call = f"{at}.tool_calls[{index}]"
            self.names |= {call: own, f"{call}.function": own, f"{call}.function.arguments": f"{own}.input"}

    def _blocks(self, content: Any, place: str, role: str) -> list[tuple[Block, str]]:
        """The blocks of a content, and their places. A text is a block of its own."""
        if isinstance(content, str):
            return [({"type": "text", "text": content}, place)]
        if not isinstance(content, (list, tuple)) or not content:
            raise InputError(f"{place} must be a string or a list of blocks", place)
        return [
            (self._block(block, f"{place}[{index}]", role), f"{place}[{index}]") for index, block in enumerate(content)
        ]

    def _block(self, block: Any, place: str, role: str) -> Block:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if not isinstance(block, Mapping) or kind not in ALLOWED[role]:
            named = f" of type {kind!r}" if isinstance(kind, str) else ""
            raise InputError(f"{place}{named} is not supported: send {', '.join(ALLOWED[role])}", f"{place}.type")
        for name in block:
            if name not in ("type", "cache_control", *BLOCK_FIELDS[kind]):
                self._unknown(f"{place}.{name}")
        if kind == "text":
            _text(block, "text", place)
        return block


def _part(block: Block, place: str) -> dict[str, Any]:
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    return {"type": "image_url", "image_url": {"url": _image_url(block.get("source"), f"{place}.source")}}


def _image_url(source: Any, place: str) -> str:
    match source:
        case {"type": "url"}:
            return _text(source, "url", place)
        case {"type": "base64"}:
            return f"data:{_text(source, 'media_type', place)};base64,{_text(source, 'data', place)}"
        case _:
            raise InputError(f"{place} must be of type base64 or url", place)


def _call(block: Block, place: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, Mapping):
        raise InputError(f"{place}.input must be an object", f"{place}.input")
    function = {"name": _text(block, "name", place), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": _text(block, "id", place), "type": "function", "function": function}


def _text(block: Block, name: str, place: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InputError(f"{place}.{name} must be a string", f"{place}.{name}")
    return value
