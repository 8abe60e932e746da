"""OpenAI's routes: chat completions with pictures, completions, models, as the official client uses them."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import starmap
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mdi.engine import Engine, Piece, Sample, Usage
from mdi.engine.prompt import Message
from mdi.errors import InputError, MediaError, ModelNotFoundError
from mdi.gateway.schemas import ChatRequest, CompletionRequest
from mdi.gateway.streaming import events, whole

ROLES = {"developer": "system"}  # OpenAI's newer name


def router(engine: Engine) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    model = {"id": engine.model_name, "object": "model", "created": int(time.time()), "owned_by": "mdi"}

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @routes.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(engine, name)
        return model

    @routes.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        _check_model(engine, body.model)
        messages = [_message(message, f"messages[{index}]") for index, message in enumerate(body.messages)]
        stream = engine.submit(messages, body.params(), min_pixels=body.min_pixels, max_pixels=body.max_pixels)
        envelope = _Envelope.new(engine, "chatcmpl")
        if body.stream:
            usage = (lambda: stream.usage) if body.wants_usage else None
            kind, choices = "chat.completion.chunk", _chat_chunks()
            return await events(request, stream, lambda pieces: envelope.chunks(kind, pieces, choices, usage))
        done = await whole(request, stream)
        return JSONResponse(
            envelope.wrap("chat.completion", list(starmap(_chat_choice, enumerate(done.samples))), done.usage)
        )

    @routes.post("/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        _check_model(engine, body.model)
        if not isinstance(body.prompt, str):
            if len(body.prompt) != 1:
                raise InputError("send one prompt a request", "prompt")
            body.prompt = body.prompt[0]
        stream = engine.submit(body.prompt, body.params())
        envelope = _Envelope.new(engine, "cmpl")
        if body.stream:
            usage = (lambda: stream.usage) if body.wants_usage else None
            return await events(
                request,
                stream,
                lambda pieces: envelope.chunks("text_completion", pieces, _text_chunks, usage),
            )
        done = await whole(request, stream)
        return JSONResponse(
            envelope.wrap("text_completion", list(starmap(_text_choice, enumerate(done.samples))), done.usage)
        )

    return routes


def _check_model(engine: Engine, name: str) -> None:
    if name != engine.model_name:
        raise ModelNotFoundError(f"the model {name!r} is not served here; {engine.model_name!r} is", "model")


def _message(message: Any, field: str) -> Message:
    """OpenAI's message as the engine takes it; what is malformed is left for the engine to refuse."""
    if not isinstance(message.get("content"), list):
        return {**message, "role": ROLES.get(message.get("role", ""), message.get("role"))}
    parts = [_part(part, f"{field}.content[{index}]") for index, part in enumerate(message["content"])]
    return {**message, "role": ROLES.get(message.get("role", ""), message.get("role")), "content": parts}


def _part(part: Any, field: str) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image_url":
        source = part.get("image_url")
        url = source.get("url") if isinstance(source, dict) else source
        if not isinstance(url, str):
            raise MediaError(f"{field}.image_url must have a url", f"{field}.image_url")
        return {"type": "image", "image": url}
    return {"type": "video"} if kind == "video_url" else part


@dataclass(frozen=True)
class _Envelope:
    """What surrounds every answer and every chunk of one request."""

    model: str
    id: str
    created: int

    @classmethod
    def new(cls, engine: Engine, prefix: str) -> _Envelope:
        return cls(engine.model_name, f"{prefix}-{secrets.token_hex(12)}", int(time.time()))

    def wrap(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        body = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return body | {"usage": _usage(usage)} if usage else body

    async def chunks(
        self,
        kind: str,
        pieces: AsyncIterator[Piece],
        choices: Callable[[Piece], list[dict[str, Any]]],
        usage: Callable[[], Usage] | None,
    ) -> AsyncIterator[dict[str, Any]]:
        """One chunk per choice of every piece, and the usage at the end if it is asked for."""
        async for piece in pieces:
            for choice in choices(piece):
                yield self.wrap(kind, [choice])
        if usage:
            yield self.wrap(kind, [], usage())


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _chat_choice(index: int, sample: Sample) -> dict[str, Any]:
    message = {"role": "assistant", "content": sample.text}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": sample.finish_reason}


def _text_choice(index: int, sample: Sample) -> dict[str, Any]:
    return {"index": index, "text": sample.text, "logprobs": None, "finish_reason": sample.finish_reason}


def _chat_chunks() -> Callable[[Piece], list[dict[str, Any]]]:
    """Every sample's first chunk names the role, its last one the finish reason."""
    started: set[int] = set()

    def choices(piece: Piece) -> list[dict[str, Any]]:
        deltas: list[tuple[dict[str, str], str | None]] = []
        if piece.index not in started:
            started.add(piece.index)
            deltas.append(({"role": "assistant", "content": ""}, None))
        if piece.text:
            deltas.append(({"content": piece.text}, None))
        if piece.finish_reason:
            deltas.append(({}, piece.finish_reason))
        return [
            {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": reason}
            for delta, reason in deltas
        ]

    return choices


def _text_chunks(piece: Piece) -> list[dict[str, Any]]:
    return [{"index": piece.index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}]
