"""OpenAI's routes: chat completions with images and videos, completions, models, as the official client uses them."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mdi.core.errors import InputError, ModelNotFoundError
from mdi.core.messages import parse_messages
from mdi.core.sampling import SamplingParams
from mdi.engine import Piece, Sample, Usage
from mdi.gateway.logprobs import Teller, chat_logprobs, nothing, text_logprobs
from mdi.gateway.schemas import ChatRequest, CompletionRequest
from mdi.gateway.streaming import Running, TextEngine, events, whole

KNOWN_IN_MESSAGES = {"role", "content", "name", "refusal", "annotations"}  # the last three change nothing
UNSUPPORTED_IN_MESSAGES = {"tool_calls", "tool_call_id", "function_call", "audio"}


def router(engine: TextEngine, aliases: Sequence[str], timeout_s: float | None) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    names = (engine.model_name, *aliases)
    started = int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "mdi"}

    def check_model(name: str) -> None:
        if name not in names:
            served = " or ".join(map(repr, names))
            raise ModelNotFoundError(f"the model {name!r} is not served here: ask for {served}", "model")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(map(described, names))}

    @routes.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name)
        return described(name)

    @routes.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        check_model(body.model)
        params = body.params()
        for index, message in enumerate(body.messages):
            _check_fields(message, f"messages[{index}]")
        running = engine.submit(
            parse_messages(body.messages), params, min_pixels=body.min_pixels, max_pixels=body.max_pixels
        )
        envelope = _Envelope.new(engine, "chatcmpl")
        tell = chat_logprobs(engine.token_bytes) if body.logprobs else nothing
        if body.stream:
            usage = (lambda: running.usage) if body.wants_usage else None
            kind, choices = "chat.completion.chunk", _chat_chunks(tell)
            render = envelope.renderer(kind, choices, usage)
            return await events(request, running, timeout_s, render)
        done = await whole(request, running, timeout_s)
        choices_made = [_chat_choice(index, sample, tell) for index, sample in enumerate(done.samples)]
        return JSONResponse(envelope.wrap("chat.completion", choices_made, done.usage))

    @routes.post("/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        check_model(body.model)
        running = _submit_all(engine, body.prompt, body.params())
        envelope = _Envelope.new(engine, "cmpl")
        tell = text_logprobs(engine.token_bytes) if body.wants_logprobs else nothing
        if body.stream:
            usage = (lambda: running.usage) if body.wants_usage else None
            render = envelope.renderer("text_completion", _text_chunks(tell), usage)
            return await events(request, running, timeout_s, render)
        done = await whole(request, running, timeout_s)
        choices = [_text_choice(index, sample, tell) for index, sample in enumerate(done.samples)]
        return JSONResponse(envelope.wrap("text_completion", choices, done.usage))

    return routes


def _check_fields(message: Mapping[str, Any], path: str) -> None:
    """Raises InputError for fields of a message that are unknown, or that would change the answer."""
    for field in message.keys() - KNOWN_IN_MESSAGES:
        if field not in UNSUPPORTED_IN_MESSAGES:
            raise InputError(f"unknown field {path}.{field}", f"{path}.{field}")
        if message[field]:
            raise InputError(f"{path}.{field} is not supported", f"{path}.{field}")


def _submit_all(engine: TextEngine, prompts: Sequence[str], params: SamplingParams) -> Running:
    """One request a prompt, all at once; if one is refused, none runs."""
    joined = _Joined([], params.n)
    try:
        for prompt in prompts:
            joined.parts.append(engine.submit(prompt, params))
    except BaseException:
        joined.cancel()
        raise
    return joined


@dataclass(frozen=True)
class _Joined:
    """Several running requests of `n` samples each as one: their pieces one request after the other, numbered on."""

    parts: list[Running]
    n: int

    @property
    def usage(self) -> Usage:
        each = [part.usage for part in self.parts]
        return Usage(
            sum(usage.prompt_tokens for usage in each),
            sum(usage.completion_tokens for usage in each),
            sum(usage.cached_tokens for usage in each),
        )

    async def __aiter__(self) -> AsyncIterator[Piece]:
        for number, part in enumerate(self.parts):
            async for piece in part:
                yield replace(piece, index=number * self.n + piece.index)

    def cancel(self) -> None:
        for part in self.parts:
            part.cancel()


@dataclass(frozen=True)
class _Envelope:
    """What surrounds every answer and every chunk of one request."""

    model: str
    id: str
    created: int

    @classmethod
    def new(cls, engine: TextEngine, prefix: str) -> _Envelope:
        return cls(engine.model_name, f"{prefix}-{secrets.token_hex(12)}", int(time.time()))

    def wrap(self, kind: str, choices: Iterable[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        body = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }
        return body | {"usage": _usage(usage)} if usage else body

    def renderer(
        self, kind: str, choices: Callable[[Piece], list[dict[str, Any]]], usage: Callable[[], Usage] | None
    ) -> Callable[[AsyncIterator[Piece]], AsyncIterator[dict[str, Any]]]:
        """What turns pieces into chunks: one per choice of every piece, and the usage at the end if it is asked for."""

        async def chunks(pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
            async for piece in pieces:
                for choice in choices(piece):
                    yield self.wrap(kind, [choice])
            if usage:
                yield self.wrap(kind, [], usage())

        return chunks


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _chat_choice(index: int, sample: Sample, tell: Teller) -> dict[str, Any]:
    message = {"role": "assistant", "content": sample.text}
    logprobs = tell(index, sample)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": sample.finish_reason}


def _text_choice(index: int, part: Sample | Piece, tell: Teller) -> dict[str, Any]:
    return {"index": index, "text": part.text, "logprobs": tell(index, part), "finish_reason": part.finish_reason}


def _chat_chunks(tell: Teller) -> Callable[[Piece], list[dict[str, Any]]]:
    """Every sample's first chunk names the role, its last one the finish reason; the one between has all tokens."""
    started: set[int] = set()

    def choice(index: int, delta: dict[str, str], reason: str | None = None, told: Any = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}

    def choices(piece: Piece) -> list[dict[str, Any]]:
        made = []
        if piece.index not in started:
            started.add(piece.index)
            made.append(choice(piece.index, {"role": "assistant", "content": ""}))
        told = tell(piece.index, piece)
        if piece.text or told:
            made.append(choice(piece.index, {"content": piece.text}, told=told))
        if piece.finish_reason:
            made.append(choice(piece.index, {}, piece.finish_reason))
        return made

    return choices


def _text_chunks(tell: Teller) -> Callable[[Piece], list[dict[str, Any]]]:
    return lambda piece: [_text_choice(piece.index, piece, tell)]
