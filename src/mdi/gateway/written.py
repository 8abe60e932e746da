"""Answers as events of typed items, and as the JSON that these events build: for /v1/responses and /v1/messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from mdi.core.outputs import Piece, Usage
from mdi.gateway.answer_parts import AnswerReader, Part
from mdi.gateway.engine import Running
from mdi.gateway.errors import ErrorAnswer, answer_to
from mdi.gateway.json_text import JsonAnswer
from mdi.gateway.request_record import record_of
from mdi.gateway.streaming import completion, events

Event = dict[str, Any]


class Writer(Protocol):
    """Writes an answer as events. content: its JSON, complete after the last event."""

    content: dict[str, Any]

    def begin(self, usage: Usage) -> Iterable[Event]: ...
    def add(self, part: Part) -> Iterable[Event]: ...
    def end(self, usage: Usage) -> Iterable[Event]: ...
    def fail(self, error: ErrorAnswer) -> Iterable[Event]: ...


async def written(
    request: Request,
    running: Running,
    reader: AnswerReader,
    writer: Writer,
    timeout_s: float | None,
    *,
    stream: bool,
    ended: Callable[[], None] = lambda: None,
) -> Response:
    """The response to a running request. ended: called when the JSON is complete, before its end is sent."""

    def parts(piece: Piece) -> Iterator[Event]:
        for part in reader.parts(piece):
            yield from writer.add(part)

    async def render(pieces: AsyncIterator[Piece]) -> AsyncIterator[Event]:
        begun = False
        try:
            async for piece in pieces:
                for event in () if begun else writer.begin(running.usage):
                    yield event
                begun = True
                for event in parts(piece):
                    yield event
        except Exception as error:
            if not begun:
                raise
            answer = answer_to(error, request.url.path)
            record_of(request.scope).late_error = answer.status
            for event in writer.fail(answer):
                yield event
            return
        last = list(writer.end(running.usage))
        ended()
        for event in last:
            yield event

    if stream:
        return await events(request, running, timeout_s, render, named=True)
    done = await completion(request, running, timeout_s)
    for piece in done.samples[0].pieces:
        list(parts(piece))
    list(writer.end(done.usage))
    ended()
    return JsonAnswer(writer.content)
