"""POST /v1/chat/completions, with images and videos."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mdi.core.config import GatewayConfig
from mdi.core.messages import Conversation, parse_messages
from mdi.core.outputs import Piece, Sample
from mdi.gateway.engine import Running, TextEngine
from mdi.gateway.json_body import JSONRoute
from mdi.gateway.openai.answer import answer
from mdi.gateway.openai.ignored import IgnoredFields
from mdi.gateway.openai.logprobs import LogprobsOf, chat_logprobs, no_logprobs
from mdi.gateway.openai.models import ServedModel
from mdi.gateway.openai.schemas import ChatRequest


def router(engine: TextEngine, served: ServedModel, config: GatewayConfig) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute)

    @routes.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        served.check(body.model)
        ignored = IgnoredFields(config.strict_requests)
        body.check_fields(ignored)
        running = _submit(engine, body, ignored)
        choices = ChatChoices(chat_logprobs(engine, body.skip_special_tokens) if body.logprobs else no_logprobs)
        response = await answer(request, body, running, choices, engine.model_name, config.request_timeout_s)
        response.headers.update(ignored.headers)
        return response

    return routes


def _submit(engine: TextEngine, body: ChatRequest, ignored: IgnoredFields) -> Running:
    messages = parse_messages(body.messages, ignored)
    conversation = Conversation(messages, body.chat_template_kwargs or {})
    return engine.submit(conversation, body.params(), min_pixels=body.min_pixels, max_pixels=body.max_pixels)


class ChatChoices:
    """Choices of one chat. In a stream, the first chunk of a sample has the role, the last one the finish reason."""

    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, logprobs_of: LogprobsOf) -> None:
        self._logprobs_of = logprobs_of
        self._started: set[int] = set()

    def whole(self, index: int, sample: Sample) -> dict[str, Any]:
        message = {"role": "assistant", "content": sample.text}
        logprobs = self._logprobs_of(index, sample)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": sample.finish_reason}

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.index not in self._started:
            self._started.add(piece.index)
            yield _chunk(piece.index, {"role": "assistant", "content": ""})
        logprobs = self._logprobs_of(piece.index, piece)
        if piece.text or logprobs:
            yield _chunk(piece.index, {"content": piece.text}, logprobs=logprobs)
        if piece.finish_reason:
            yield _chunk(piece.index, {}, piece.finish_reason)


def _chunk(
    index: int, delta: dict[str, str], reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
