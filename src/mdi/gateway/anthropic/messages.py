"""POST /v1/messages and POST /v1/messages/count_tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from mdi.core.config import GatewayConfig
from mdi.gateway.anthropic.message_events import MessageWriter
from mdi.gateway.anthropic.schemas import CountRequest, MessagesRequest
from mdi.gateway.engine import TextEngine
from mdi.gateway.json_body import JSONRoute
from mdi.gateway.json_text import JsonAnswer
from mdi.gateway.openai.ignored import IgnoredFields
from mdi.gateway.openai.models import ServedModel
from mdi.gateway.streaming import completion
from mdi.gateway.written import written


def router(engine: TextEngine, served: ServedModel, config: GatewayConfig) -> APIRouter:
    routes = APIRouter(prefix="/v1", route_class=JSONRoute)

    @routes.post("/messages")
    async def create(request: Request, body: MessagesRequest) -> Response:
        served.check(body.model)
        ignored = IgnoredFields(config.strict_requests)
        chat = body.as_chat(ignored)
        with chat.own_names():
            running, reader = chat.submit(engine, ignored)
            writer = MessageWriter(served.name)
            response = await written(request, running, reader, writer, config.request_timeout_s, stream=body.stream)
        response.headers.update(ignored.headers)
        return response

    @routes.post("/messages/count_tokens")
    async def count_tokens(request: Request, body: CountRequest) -> Response:
        """The tokens of a prompt. Images are decoded for the number of theirs, not encoded."""
        served.check(body.model)
        ignored = IgnoredFields(config.strict_requests)
        chat = body.as_chat(ignored)
        with chat.own_names():
            running = chat.prepare(engine, ignored)
            await completion(request, running, config.request_timeout_s)
        return JsonAnswer({"input_tokens": len(running.prompt_token_ids)}, headers=ignored.headers)

    return routes
