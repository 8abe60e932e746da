"""POST /v1/chat/completions, with images and videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mdi.core.config import GatewayConfig
from mdi.core.errors import InputError
from mdi.core.messages import parse_messages
from mdi.core.outputs import Piece, Sample
from mdi.gateway.engine import Running, TextEngine
from mdi.gateway.openai.answer import answer
from mdi.gateway.openai.logprobs import LogprobsOf, chat_logprobs, no_logprobs
from mdi.gateway.openai.models import ServedModel
from mdi.gateway.openai.schemas import ChatRequest

KNOWN_IN_MESSAGES = {"role", "content", "name", "refusal", "annotations"}  # the last three have no effect
UNSUPPORTED_IN_MESSAGES = {"tool_calls", "tool_call_id", "function_call", "audio"}


def router(engine: TextEngine, served: ServedModel, config: GatewayConfig) -> APIRouter:
    routes = APIRouter()

    @routes.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        served.check(body.model)
        running = _submit(engine, body)
        choices = ChatChoices(chat_logprobs(engine.token_bytes) if body.logprobs else no_logprobs)
        return await answer(request, body, running, choices, engine.model_name, config.request_timeout_s)

    return routes


def _submit(engine: TextEngine, body: ChatRequest) -> Running:
    params = body.params()
    for index, message in enumerate(body.messages):
        _check_fields(message, f"messages[{index}]")
    messages = parse_messages(body.messages)
    return engine.submit(messages, params, min_pixels=body.min_pixels, max_pixels=body.max_pixels)


def _check_fields(message: Mapping[str, Any], path: str) -> None:
    """Raises InputError for fields of a message that are unknown, or that would change the answer."""
    for field in message.keys() - KNOWN_IN_MESSAGES:
        if field not in UNSUPPORTED_IN_MESSAGES:
            raise InputError(f"unknown field {path}.{field}", f"{path}.{field}")
        if message[field]:
            raise InputError(f"{path}.{field} is not supported", f"{path}.{field}")


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
