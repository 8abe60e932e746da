"""The input of /v1/responses, items of a conversation, as messages in the chat form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mdi.core.errors import InputError
from mdi.core.unknown_fields import UnknownField

Item = Mapping[str, Any]

ITEM_FIELDS: Mapping[str, tuple[str, ...]] = {
    "message": ("role", "content", "phase"),
    "function_call": ("call_id", "name", "arguments", "namespace", "caller", "async"),
    "function_call_output": ("call_id", "output", "caller", "name"),
    "reasoning": ("summary", "content", "encrypted_content"),
}
"""The types of items that are read, and their fields. `status` and `id`, of every type, change nothing."""

PART_FIELDS: Mapping[str, tuple[str, ...]] = {
    "input_text": ("text", "prompt_cache_breakpoint"),
    "output_text": ("text", "annotations", "logprobs"),
    "refusal": ("refusal",),
    "input_image": ("image_url", "detail", "file_id", "prompt_cache_breakpoint"),
}


class InputMessages:
    """Messages of a chat, and the items that they are made of.

    messages: in the chat form. names: the places of messages, and of what is in them, as the caller named them.
    unknown: called with the path of each unknown field.
    """

    def __init__(self, unknown: UnknownField) -> None:
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}
        self._unknown = unknown

    def instruct(self, text: str) -> None:
        """Adds the instructions, which come first."""
        self._add({"role": "system", "content": text}, "instructions")

    def add(self, items: Sequence[Item], place: str) -> None:
        """Adds items. Raises InputError, naming the item, for types that are not supported and for what is no item."""
        for index, item in enumerate(items):
            self._add_item(item, f"{place}[{index}]")

    def _add_item(self, item: Any, place: str) -> None:
        if not isinstance(item, Mapping):
            raise InputError(f"{place} must be an object", place)
        kind = item.get("type")
        if kind is None and "role" in item:
            kind = "message"
        if not isinstance(kind, str) or kind not in ITEM_FIELDS:
            remedy = "send the item itself, or previous_response_id" if kind == "item_reference" else "leave it out"
            raise InputError(f"{place} of type {kind!r} is not supported: {remedy}", f"{place}.type")
        for name in item:
            if name not in ("type", "id", "status", *ITEM_FIELDS[kind]):
                self._unknown(f"{place}.{name}")
        if kind == "message":
            self._add({"role": item.get("role"), "content": self._content(item.get("content"), place)}, place)
        elif kind == "function_call":
            self._add_call(item, place)
        elif kind == "function_call_output":
            self._add_output(item, place)

    def _add(self, message: dict[str, Any], place: str) -> None:
        self.names[f"messages[{len(self.messages)}]"] = place
        self.messages.append(message)

    def _add_call(self, item: Item, place: str) -> None:
        """A call belongs to the assistant's message before it, where there is one."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._add({"role": "assistant", "content": None}, place)
        calls = self.messages[-1].setdefault("tool_calls", [])
        at = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"
        self.names |= {at: place, f"{at}.function": place, f"{at}.id": f"{place}.call_id"}
        function = {"name": _text(item, "name", place), "arguments": _text(item, "arguments", place)}
        calls.append({"id": _text(item, "call_id", place), "type": "function", "function": function})

    def _add_output(self, item: Item, place: str) -> None:
        if item.get("output") is None:
            raise InputError(f"{place}.output must be a string or a list of parts", f"{place}.output")
        output = self._content(item["output"], place, "output")
        self._add({"role": "tool", "tool_call_id": _text(item, "call_id", place), "content": output}, place)
        last = f"messages[{len(self.messages) - 1}]"
        self.names |= {f"{last}.content": f"{place}.output", f"{last}.tool_call_id": f"{place}.call_id"}

    def _content(self, content: Any, place: str, name: str = "content") -> Any:
        """Content in the chat form. What is neither a text nor a list of parts stays, for a chat's own error."""
        if not isinstance(content, (list, tuple)):
            return content
        return [self._part(part, f"{place}.{name}[{index}]") for index, part in enumerate(content)]

    def _part(self, part: Any, place: str) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        make = PARTS.get(kind) if isinstance(kind, str) else None
        if make is None:
            shown = f" of type {kind!r}" if isinstance(kind, str) else ""
            raise InputError(f"{place}{shown} is not supported: send input_text or input_image", place)
        for field in part:
            if field not in ("type", *PART_FIELDS[str(kind)]):
                self._unknown(f"{place}.{field}")
        return make(part, place)


def _text_part(part: Item, place: str) -> dict[str, Any]:
    return {"type": "text", "text": _text(part, "text", place)}


def _refusal_part(part: Item, place: str) -> dict[str, Any]:
    return {"type": "text", "text": _text(part, "refusal", place)}


def _image_part(part: Item, place: str) -> dict[str, Any]:
    if part.get("file_id") is not None:
        raise InputError(f"{place}.file_id is not supported: send image_url, a URL or a data: URL", f"{place}.file_id")
    detail = {"detail": part["detail"]} if part.get("detail") is not None else {}
    if detail == {"detail": "original"}:  # OpenAI's newest level, which changes nothing here as the others
        detail = {}
    return {"type": "image_url", "image_url": {"url": _text(part, "image_url", place)} | detail}


PARTS: Mapping[str, Callable[[Item, str], dict[str, Any]]] = {
    "input_text": _text_part,
    "output_text": _text_part,
    "refusal": _refusal_part,
    "input_image": _image_part,
}


def _text(item: Item, name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InputError(f"{place}.{name} must be a string", f"{place}.{name}")
    return value
