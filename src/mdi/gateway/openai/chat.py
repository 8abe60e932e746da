"""POST /v1/chat/completions, with images and videos."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mdi.core.config import GatewayConfig
from mdi.core.messages import Conversation, parse_messages
from mdi.core.outputs import Piece, Sample
from mdi.gateway.answer_parts import (
    Answer,
    AnswerReader,
    ArgumentsDelta,
    CallStart,
    Finish,
    ReasoningDelta,
    TextDelta,
)
from mdi.gateway.engine import Running, TextEngine
from mdi.gateway.json_body import JSONRoute
from mdi.gateway.openai.answer import answer
from mdi.gateway.openai.ignored import IgnoredFields
from mdi.gateway.openai.logprobs import ChatLogprobsOf, chat_logprobs, no_logprobs
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
        logprobs_of = chat_logprobs(engine, body.skip_special_tokens) if body.logprobs else no_logprobs
        choices = ChatChoices(AnswerReader(), logprobs_of)
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

    def __init__(self, reader: AnswerReader, logprobs_of: ChatLogprobsOf) -> None:
        self._reader = reader
        self._logprobs_of = logprobs_of
        self._started: set[int] = set()

    def whole(self, index: int, sample: Sample) -> dict[str, Any]:
        answer = self._reader.whole(index, sample)
        logprobs = self._logprobs_of(answer.tokens)
        return {"index": index, "message": _message(answer), "logprobs": logprobs, "finish_reason": answer.reason}

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.index not in self._started:
            self._started.add(piece.index)
            yield _chunk(piece.index, {"role": "assistant", "content": ""})
        for part in self._reader.parts(piece):
            logprobs = self._logprobs_of(part.tokens) if part.tokens else None
            if isinstance(part, Finish):
                yield _chunk(part.index, {}, part.reason, logprobs)
            else:
                yield _chunk(part.index, _delta(part), None, logprobs)


def _message(answer: Answer) -> dict[str, Any]:
    """A whole answer as OpenAI's message: fields that say nothing are left out, but content."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if answer.calls else "")}
    if answer.reasoning:
        message["reasoning_content"] = message["reasoning"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message


def _delta(part: TextDelta | ReasoningDelta | CallStart | ArgumentsDelta) -> dict[str, Any]:
    """What a part adds to the message, as OpenAI's delta."""
    match part:
        case TextDelta():
            return {"content": part.text}
        case ReasoningDelta():
            return {"reasoning_content": part.text, "reasoning": part.text}
        case CallStart():
            function = {"name": part.name, "arguments": ""}
            return {"tool_calls": [{"index": part.call, "id": part.id, "type": "function", "function": function}]}
        case ArgumentsDelta():
            return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}


def _chunk(
    index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
