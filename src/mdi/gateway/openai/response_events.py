"""The events and the JSON of a response, from the parts of its answer."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from mdi.core.outputs import Usage
from mdi.gateway.answer_parts import AnswerReader, ArgumentsDelta, CallStart, Finish, Part, ReasoningDelta, TextDelta
from mdi.gateway.errors import ErrorAnswer
from mdi.gateway.openai.logprobs import ChatLogprobsOf
from mdi.gateway.written import Event


@dataclass(frozen=True)
class _TextKind:
    """A kind of items that hold a text. prefix: of their ids. events: of their texts. item, part: their own fields."""

    prefix: str
    events: str
    item: Mapping[str, Any]
    part: Mapping[str, Any]


MESSAGE = _TextKind(
    "msg",
    "response.output_text",
    {"type": "message", "role": "assistant"},
    {"type": "output_text", "text": "", "annotations": (), "logprobs": ()},
)
REASONING = _TextKind(
    "rs", "response.reasoning_text", {"type": "reasoning", "summary": ()}, {"type": "reasoning_text", "text": ""}
)


class ResponseWriter:
    """Writes a response as a stream of events; `content` is its JSON, complete after the last event.

    head: the fields of the JSON that the request decides. reader: of the parts.
    """

    def __init__(self, head: Mapping[str, Any], reader: AnswerReader, logprobs_of: ChatLogprobsOf) -> None:
        self.content: dict[str, Any] = {**head, "status": "in_progress", "output": []}
        self._logprobs_of = logprobs_of
        self._numbers = count()
        self._item: dict[str, Any] | None = None  # the one that is being written, the last of the output
        self._kind: _TextKind | None = None  # of that item; None for a call
        self._cut = False
        self._reader = reader

    def begin(self, usage: Usage) -> Iterator[Event]:  # noqa: ARG002
        """The first events."""
        yield self._event("response.created", response=dict(self.content))
        yield self._event("response.in_progress", response=dict(self.content))

    def add(self, part: Part) -> Iterator[Event]:
        """The events of the next part."""
        match part:
            case TextDelta():
                yield from self._write(MESSAGE, part)
            case ReasoningDelta():
                yield from self._write(REASONING, part)
            case CallStart():
                yield from self._open(
                    None, {"type": "function_call", "call_id": part.id, "name": part.name, "arguments": ""}, "fc"
                )
            case ArgumentsDelta():
                assert self._item is not None
                self._item["arguments"] += part.text
                yield self._of_item("response.function_call_arguments.delta", delta=part.text)
            case Finish():
                self._cut = part.reason == "length"

    def end(self, usage: Usage) -> Iterator[Event]:
        """The last events. An answer of no parts is a message without text."""
        if not self.content["output"]:
            yield from self._open(MESSAGE, MESSAGE.item, MESSAGE.prefix)
        status = "incomplete" if self._cut else "completed"
        yield from self._close(status)
        self.content |= {"status": status, "usage": _usage(usage, self._reader.reasoning_tokens or 0)}
        if self._cut:
            self.content["incomplete_details"] = {"reason": "max_output_tokens"}
        yield self._event(f"response.{status}", response=self.content)

    def fail(self, error: ErrorAnswer) -> Iterator[Event]:
        """The last events of a response that an error ends."""
        yield from self._close("incomplete")
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self.content |= {"status": "failed", "error": {"code": code, "message": error.message}}
        yield self._event("response.failed", response=self.content)

    def _write(self, kind: _TextKind, part: TextDelta | ReasoningDelta) -> Iterator[Event]:
        """Adds to the text of an item of this kind, a new one where another kind is being written."""
        logprobs = (self._logprobs_of(part.tokens) or {}).get("content", ()) if kind is MESSAGE else ()
        if not part.text and not logprobs:
            return
        if self._kind is not kind:
            yield from self._open(kind, kind.item, kind.prefix)
        assert self._item is not None
        content = self._item["content"][0]
        content["text"] += part.text
        fields: Event = {"delta": part.text}
        if kind is MESSAGE:
            content["logprobs"] = (*content["logprobs"], *logprobs)
            fields["logprobs"] = logprobs
        yield self._of_part(f"{kind.events}.delta", **fields)

    def _open(self, kind: _TextKind | None, fields: Mapping[str, Any], prefix: str) -> Iterator[Event]:
        yield from self._close("completed")
        self._kind = kind
        self._item = {"id": f"{prefix}_{secrets.token_hex(12)}", **fields, "status": "in_progress"}
        if kind:
            self._item["content"] = []
        self.content["output"].append(self._item)
        yield self._of_output("response.output_item.added", item=dict(self._item))
        if kind:
            self._item["content"] = [dict(kind.part)]
            yield self._of_part("response.content_part.added", part=dict(kind.part))

    def _close(self, status: str) -> Iterator[Event]:
        item, kind = self._item, self._kind
        if item is None:
            return
        if kind:
            part = item["content"][0]
            logprobs = {"logprobs": part["logprobs"]} if kind is MESSAGE else {}
            yield self._of_part(f"{kind.events}.done", text=part["text"], **logprobs)
            yield self._of_part("response.content_part.done", part=part)
        else:
            yield self._of_item("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        item["status"] = status
        yield self._of_output("response.output_item.done", item=item)
        self._item = self._kind = None

    def _of_part(self, kind: str, **fields: Any) -> Event:
        return self._of_item(kind, content_index=0, **fields)

    def _of_item(self, kind: str, **fields: Any) -> Event:
        assert self._item is not None
        return self._of_output(kind, item_id=self._item["id"], **fields)

    def _of_output(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, output_index=len(self.content["output"]) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}


def _usage(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
