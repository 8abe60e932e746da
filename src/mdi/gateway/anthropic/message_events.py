"""The events and the JSON of a message in Anthropic's form, from the parts of an answer."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from mdi.core.outputs import Usage
from mdi.gateway.answer_parts import ArgumentsDelta, CallStart, EndReason, Finish, Part, ReasoningDelta, TextDelta
from mdi.gateway.errors import ErrorAnswer
from mdi.gateway.written import Event

STOP_REASONS: dict[EndReason, str] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
PATH = "/v1/messages"


class MessageWriter:
    """Writes a message as a stream of events; `content` is its JSON, complete after the last event."""

    def __init__(self, model: str) -> None:
        self.content: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._arguments = ""  # of the block that is being written, if it is a call
        self._open: str | None = None  # the type of that block

    def begin(self, usage: Usage) -> Iterator[Event]:
        """The first events."""
        started = self.content | {"content": [], "usage": _usage(usage) | {"output_tokens": 0}}
        yield {"type": "message_start", "message": started}
        yield {"type": "ping"}

    def add(self, part: Part) -> Iterator[Event]:
        """The events of the next part."""
        match part:
            case TextDelta(text=text) if text:
                yield from self._write("text", "text", text)
            case ReasoningDelta(text=text) if text:
                yield from self._write("thinking", "thinking", text)
            case CallStart():
                yield from self._start({"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
            case ArgumentsDelta():
                self._arguments += part.text
                yield self._delta({"type": "input_json_delta", "partial_json": part.text})
            case Finish():
                self.content |= self._reason(part)

    def end(self, usage: Usage) -> Iterator[Event]:
        """The last events."""
        yield from self._stop()
        self.content["usage"] = _usage(usage)
        delta = {name: self.content[name] for name in ("stop_reason", "stop_sequence")}
        yield {"type": "message_delta", "delta": delta, "usage": self.content["usage"]}
        yield {"type": "message_stop"}

    def fail(self, error: ErrorAnswer) -> Iterator[Event]:
        """The last event of a message that an error ends."""
        yield error.body(PATH)

    def _reason(self, part: Finish) -> dict[str, Any]:
        """Why the answer ended: for the result of a tool, too, that the request named."""
        called = any(block["type"] == "tool_use" for block in self.content["content"])
        if part.reason == "stop" and isinstance(part.stopped_by, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": part.stopped_by}
        return {"stop_reason": STOP_REASONS["tool_calls" if part.reason == "stop" and called else part.reason]}

    def _write(self, kind: str, field: str, text: str) -> Iterator[Event]:
        """Adds to the text of a block of this kind, a new one where another kind is being written."""
        if self._open != kind:
            yield from self._start({"type": kind, field: ""} | ({"signature": ""} if kind == "thinking" else {}))
        self.content["content"][-1][field] += text
        yield self._delta({"type": f"{kind}_delta", field: text})

    def _start(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._stop()
        self._open, self._arguments = block["type"], ""
        self.content["content"].append(block)
        yield {"type": "content_block_start", "index": self._index, "content_block": dict(block)}

    def _stop(self) -> Iterator[Event]:
        if self._open is None:
            return
        if self._open == "tool_use":
            self.content["content"][-1]["input"] = _object(self._arguments)
        yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self.content["content"]) - 1


def _object(arguments: str) -> Any:
    """The arguments of a call; none of a call that was cut off."""
    try:
        read = json.loads(arguments)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _usage(usage: Usage) -> dict[str, int]:
    """Tokens in Anthropic's form, where those from the cache do not count as input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
