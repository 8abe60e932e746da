"""POST /generate and POST /generate/multimodal, which answer {"samples": [text, ...]}."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, HTTPException, Request
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from mdi.core import unknown_fields
from mdi.core.config import GatewayConfig
from mdi.core.messages import PromptInput, parse_messages
from mdi.core.outputs import Piece
from mdi.core.sampling import SampleCount
from mdi.gateway.engine import TextEngine
from mdi.gateway.json_body import JSONRoute
from mdi.gateway.json_text import JsonAnswer
from mdi.gateway.message_schema import messages_schema
from mdi.gateway.schemas import NOT_JSON, GatewayRequest
from mdi.gateway.streaming import completion, events
from mdi.gateway.uploads import read_form

MAX_UPLOADS = 64


class GenerateRequest(GatewayRequest):
    """The fields of both routes."""

    n: SampleCount = Field(1, alias="n_samples")
    top_logprobs: ClassVar[int] = 0  # type: ignore[misc]  # the answers have none: an unknown field here


class TextRequest(GenerateRequest):
    """POST /generate."""

    prompt: str


class MultimodalRequest(GenerateRequest):
    """POST /generate/multimodal. messages: see `mdi.core.messages.parse_messages`."""

    messages: Annotated[list[dict[str, Any]], WithJsonSchema(messages_schema(strict=True))]


def router(engine: TextEngine, config: GatewayConfig) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute)

    async def answer(request: Request, prompt: PromptInput, body: GenerateRequest) -> Response:
        running = engine.submit(prompt, body.params(), min_pixels=body.min_pixels, max_pixels=body.max_pixels)
        if body.stream:
            return await events(request, running, config.request_timeout_s, _render)
        done = await completion(request, running, config.request_timeout_s)
        return JsonAnswer({"samples": [sample.text for sample in done.samples]})

    @routes.post("/generate")
    async def generate(request: Request, body: TextRequest) -> Response:
        return await answer(request, body.prompt, body)

    @routes.post("/generate/multimodal")
    async def generate_multimodal(request: Request) -> Response:
        body = MultimodalRequest.model_validate(await _content(request, config.max_body_bytes))
        return await answer(request, parse_messages(body.messages, unknown_fields.refuse), body)

    return routes


async def _content(request: Request, max_field_bytes: int) -> Any:
    """The content of a request sent as JSON, or as a form with files."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        return await request.json()
    if content_type != "multipart/form-data":
        raise HTTPException(415, f"{NOT_JSON}, or as multipart/form-data with files")
    async with request.form(max_files=MAX_UPLOADS, max_part_size=max_field_bytes) as form:
        return await read_form(form)


async def _render(pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
    async for piece in pieces:
        yield {"index": piece.index, "text": piece.text, "finish_reason": piece.finish_reason}
