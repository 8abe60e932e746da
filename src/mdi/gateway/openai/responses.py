"""POST /v1/responses, and the routes of responses that are kept."""

from __future__ import annotations

import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mdi.core.config import GatewayConfig
from mdi.core.errors import InputError
from mdi.gateway.engine import TextEngine
from mdi.gateway.errors import ErrorAnswer
from mdi.gateway.json_body import JSONRoute
from mdi.gateway.json_text import JsonAnswer
from mdi.gateway.openai.ignored import IgnoredFields
from mdi.gateway.openai.logprobs import chat_logprobs, no_logprobs
from mdi.gateway.openai.models import ServedModel
from mdi.gateway.openai.response_events import ResponseWriter
from mdi.gateway.openai.response_schema import ResponsesRequest
from mdi.gateway.openai.response_store import ResponseStore
from mdi.gateway.request_record import record_of
from mdi.gateway.written import written

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
            writer = ResponseWriter(_head(body, served.name), reader, logprobs_of)

            response = await written(
                request,
                running,
                reader,
                writer,
                config.request_timeout_s,
                stream=body.stream,
                ended=lambda: kept.keep(writer.content),
            )
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
