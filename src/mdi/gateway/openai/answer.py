"""Answers of OpenAI's routes: the envelope around choices, whole or in chunks, and the usage."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from mdi.core.outputs import Piece, Sample, Usage
from mdi.gateway.engine import Running
from mdi.gateway.json_text import JsonAnswer
from mdi.gateway.openai.schemas import OpenAIRequest
from mdi.gateway.streaming import completion, events


class Choices(Protocol):
    """The form of a route's choices. kind, chunk_kind: OpenAI's names of a whole answer and of a chunk."""

    id_prefix: str
    kind: str
    chunk_kind: str

    def whole(self, index: int, sample: Sample) -> dict[str, Any]: ...
    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]: ...


async def answer(
    request: Request, body: OpenAIRequest, running: Running, choices: Choices, model: str, timeout_s: float | None
) -> Response:
    """A running request as OpenAI's clients expect it: as chunks if the body asks for a stream, otherwise whole."""
    envelope = {"id": f"{choices.id_prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    async def chunks(pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
        chunk = envelope | {"object": choices.chunk_kind}
        async for piece in pieces:
            for choice in choices.chunks(piece):
                yield chunk | {"choices": [choice]}
        if body.wants_usage:
            yield chunk | {"choices": [], "usage": _usage(running.usage)}

    if body.stream:
        return await events(request, running, timeout_s, chunks)
    done = await completion(request, running, timeout_s)
    made = [choices.whole(index, sample) for index, sample in enumerate(done.samples)]
    return JsonAnswer(envelope | {"object": choices.kind, "choices": made, "usage": _usage(done.usage)})


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
