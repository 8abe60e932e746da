"""Answers of OpenAI's routes: the envelope around choices, whole or in chunks, and the usage."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from mdi.core.outputs import Piece, Sample, Usage
from mdi.gateway.answer_parts import Finish
from mdi.gateway.engine import Running
from mdi.gateway.json_text import JsonAnswer
from mdi.gateway.openai.schemas import OpenAIRequest
from mdi.gateway.streaming import completion, events


class Choices(Protocol):
    """The form of a route's choices. kind, chunk_kind: OpenAI's names of a whole answer and of a chunk.

    shared: fields beside the choices, of a whole answer or of the first chunk. completion_details: fields of the usage
    that are known once all choices are made.
    """

    id_prefix: str
    kind: str
    chunk_kind: str

    def shared(self) -> dict[str, Any]: ...
    def completion_details(self) -> dict[str, Any]: ...
    def whole(self, index: int, sample: Sample) -> dict[str, Any]: ...
    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]: ...


async def answer(
    request: Request, body: OpenAIRequest, running: Running, choices: Choices, model: str, timeout_s: float | None
) -> Response:
    """A running request as OpenAI's clients expect it: as chunks if the body asks for a stream, otherwise whole."""
    envelope = {"id": f"{choices.id_prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    async def chunks(pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
        chunk = envelope | {"object": choices.chunk_kind}
        usage, shared = Usage(0, 0), None
        async for piece in pieces:
            if body.wants_usage_so_far:
                usage = _so_far(running.usage, usage, piece)
            for choice in choices.chunks(piece):
                content = {**chunk, "choices": [choice]}
                if shared is None:
                    content |= (shared := choices.shared())
                if body.wants_usage_so_far:
                    content["usage"] = usage_json(usage)
                yield content
        if body.wants_usage:
            yield chunk | {"choices": [], "usage": usage_json(running.usage) | choices.completion_details()}

    if body.stream:
        return await events(request, running, timeout_s, chunks)
    done = await completion(request, running, timeout_s)
    made = [choices.whole(index, sample) for index, sample in enumerate(done.samples)]
    usage = usage_json(done.usage) | choices.completion_details()
    content = envelope | {"object": choices.kind, "choices": made, "usage": usage}
    return JsonAnswer(content | choices.shared())


def _so_far(whole: Usage, before: Usage, piece: Piece) -> Usage:
    """The usage up to a piece: the engine may be ahead of what is sent."""
    return replace(whole, completion_tokens=before.completion_tokens + len(piece.tokens))


def stop_reason(part: Piece | Sample | Finish) -> dict[str, Any]:
    """vLLM's field: the stop string or token that ended an answer, where one did."""
    return {} if part.stopped_by is None else {"stop_reason": part.stopped_by}


def usage_json(usage: Usage) -> dict[str, Any]:
    """Usage in OpenAI's form."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
