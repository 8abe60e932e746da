"""POST /v1/responses, and the routes of responses that are kept."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mdi.core.config import GatewayConfig
from mdi.core.errors import InputError
from mdi.core.outputs import Completion, Piece
from mdi.gateway.answer_parts import AnswerReader
from mdi.gateway.engine import Submitted, TextEngine
from mdi.gateway.errors import ErrorAnswer, answer_to
from mdi.gateway.json_body import JSONRoute
from mdi.gateway.json_text import JsonAnswer
from mdi.gateway.openai.ignored import IgnoredFields
from mdi.gateway.openai.logprobs import chat_logprobs, no_logprobs
from mdi.gateway.openai.models import ServedModel
from mdi.gateway.openai.response_events import ResponseWriter
from mdi.gateway.openai.response_schema import ResponsesRequest
from mdi.gateway.openai.response_store import ResponseStore
from mdi.gateway.request_record import RequestRecord, record_of
from mdi.gateway.streaming import completion, events

PATH = "/v1/responses"


def router(engine: TextEngine, served: ServedModel, config: GatewayConfig) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute)
    store = ResponseStore()

    @routes.post("/responses")
    async def create(request: Request, body: ResponsesRequest) -> Response:
        served.check(body.model)
        ignored = IgnoredFields(config.strict_requests)
        kept = _Kept(store, record_of(request.scope).key, body)
        chat = body.as_chat(kept.earlier, ignored)
        with chat.own_names():
            running, reader = chat.submit(engine, ignored)
            logprobs_of = chat_logprobs(engine, skip_special_tokens=True) if body.wants_logprobs else no_logprobs
            writer = ResponseWriter(_head(body, served.name), logprobs_of)

            answer = _Answer(running, reader, writer, kept, record_of(request.scope))
            if body.stream:
                response = await events(request, running, config.request_timeout_s, answer.events, named=True)
            else:
                done = await completion(request, running, config.request_timeout_s)
                response = JsonAnswer(answer.whole(done))
        response.headers.update(ignored.headers)
        return response

    @routes.get("/responses/{name}")
    async def retrieve(request: Request, name: str) -> Response:
        stored = store.get(record_of(request.scope).key, name)
        return JsonAnswer(stored.content) if stored else _missing(name)

    @routes.delete("/responses/{name}")
    async def delete(request: Request, name: str) -> Response:
        if not store.remove(record_of(request.scope).key, name):
            return _missing(name)
        return JsonAnswer({"id": name, "object": "response", "deleted": True})

    return routes


class _Kept:
    """What is kept of one request, and the conversation before it. Raises InputError where that is not kept."""

    def __init__(self, store: ResponseStore, caller: str, body: ResponsesRequest) -> None:
        self._store = store
        self._caller = caller
        self._body = body
        self.earlier = self._found(body.previous_response_id) if body.previous_response_id else ()

    def keep(self, response: dict[str, Any]) -> None:
        if self._body.store:
            self._store.add(self._caller, response, self.earlier, tuple(self._body.items))

    def _found(self, name: str) -> tuple[Any, ...]:
        stored = self._store.get(self._caller, name)
        if stored is None:
            raise InputError(
                f"the response {name!r} is not kept here: it is unknown, deleted, or as old as the server's memory "
                "reaches; send the conversation as input",
                "previous_response_id",
            )
        return stored.items


@dataclass(frozen=True)
class _Answer:
    """The answer to a running request, whole or as events."""

    running: Submitted
    reader: AnswerReader
    writer: ResponseWriter
    kept: _Kept
    record: RequestRecord

    def whole(self, done: Completion) -> dict[str, Any]:
        for piece in done.samples[0].pieces:
            list(self._of(piece))
        list(self.writer.end(done.usage))
        self.kept.keep(self.writer.response)
        return self.writer.response

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
        """An error before the first piece is raised, a later one is the last event."""
        begun = False
        try:
            async for piece in pieces:
                for event in () if begun else self.writer.begin():
                    yield event
                begun = True
                for event in self._of(piece):
                    yield event
        except Exception as error:
            if not begun:
                raise
            answer = answer_to(error, PATH)
            self.record.late_error = answer.status
            for event in self.writer.fail(answer):
                yield event
            return
        last = list(self.writer.end(self.running.usage))
        self.kept.keep(self.writer.response)  # before its end is seen: the next request may name it
        for event in last:
            yield event

    def _of(self, piece: Piece) -> Iterator[dict[str, Any]]:
        for part in self.reader.parts(piece):
            yield from self.writer.add(part)


def _head(body: ResponsesRequest, model: str) -> dict[str, Any]:
    """The fields of a response that its request decides."""
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": body.text.format or {"type": "text"}},
        "tool_choice": body.tool_choice,
        "tools": body.tools,
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _missing(name: str) -> Response:
    return ErrorAnswer(404, f"the response {name!r} is not kept here: it is unknown or deleted").response(PATH)
