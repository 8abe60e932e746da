"""The guide's routes: POST /generate and POST /generate/multimodal, which answer {"samples": [text, ...]}."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, Response

from mdi.engine import Engine, Piece
from mdi.engine.prompt import Message
from mdi.errors import InputError
from mdi.gateway.schemas import GenerateRequest, MultimodalRequest
from mdi.gateway.streaming import events, whole

R = TypeVar("R", bound=BaseModel)
UPLOAD_FIELDS = ("image", "images", "file", "files")
MAX_UPLOADS = 64


def router(engine: Engine) -> APIRouter:
    routes = APIRouter()

    @routes.post("/generate")
    async def generate(request: Request, body: GenerateRequest) -> Response:
        return await _answer(request, engine, body.prompt, body)

    @routes.post("/generate/multimodal")
    async def generate_multimodal(request: Request) -> Response:
        body = await _multimodal_body(request)
        return await _answer(request, engine, body.messages, body)

    return routes


async def _answer(
    request: Request, engine: Engine, prompt: str | list[Message], body: GenerateRequest | MultimodalRequest
) -> Response:
    stream = engine.submit(prompt, body.params(), min_pixels=body.min_pixels, max_pixels=body.max_pixels)
    if body.stream:
        return await events(request, stream, _render)
    completion = await whole(request, stream)
    return JSONResponse({"samples": [sample.text for sample in completion.samples]})


async def _render(pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
    async for piece in pieces:
        yield {"index": piece.index, "text": piece.text, "finish_reason": piece.finish_reason}


async def _multimodal_body(request: Request) -> MultimodalRequest:
    """The request from JSON, or from a form with files."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        return _validated(MultimodalRequest, await _json(request))
    async with request.form(max_files=MAX_UPLOADS) as form:
        return await _from_form(form)


async def _json(request: Request) -> Any:
    try:
        return await request.json()
    except ValueError:
        raise InputError("the body is not valid JSON") from None


async def _from_form(form: FormData) -> MultimodalRequest:
    """Form fields as in JSON, each value JSON or plain text; files stand for the image parts that lack an image.

    Without `messages`, `prompt` and the files make one user message.
    """
    uploads = [
        (part.filename, await part.read())
        for field, part in form.multi_items()
        if isinstance(part, UploadFile) and _is_upload_field(field)
    ]
    fields = {name: _value(name, text) for name, text in form.multi_items() if isinstance(text, str)}
    prompt = fields.pop("prompt", None)
    if "messages" not in fields:
        if prompt is None:
            raise InputError("a form needs messages, or a prompt", "messages")
        parts = [{"type": "image", "image": content} for _, content in uploads]
        fields["messages"] = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
    elif prompt is not None:
        raise InputError("send messages or a prompt, not both", "prompt")
    else:
        _place_uploads(fields["messages"], uploads)
    return _validated(MultimodalRequest, fields)


def _is_upload_field(field: str) -> bool:
    if field not in UPLOAD_FIELDS:
        raise InputError(f"files come in the fields {', '.join(UPLOAD_FIELDS)}, not {field!r}", field)
    return True


def _value(name: str, text: str) -> Any:
    if name in ("prompt", "stop") and not (name == "stop" and text.startswith("[")):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise InputError(f"the form field {name} is not valid JSON", name) from None


def _place_uploads(messages: Any, uploads: list[tuple[str | None, bytes]]) -> None:
    """Puts uploads where image parts name them by file name, or lack an image, in order."""
    by_name = dict(uploads)
    unnamed = iter(uploads)
    used = 0
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or part.get("type") != "image":
                continue
            if part.get("image") in by_name:
                part["image"] = by_name[part["image"]]
                used += 1
            elif not part.get("image"):
                upload = next(unnamed, None)
                if upload is None:
                    raise InputError("there are more image parts than uploaded files", "messages")
                part["image"] = upload[1]
                used += 1
    if used < len(uploads):
        raise InputError(f"{len(uploads)} files were uploaded, but the messages place {used}", "messages")


def _validated(kind: type[R], content: Any) -> R:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or None
        raise InputError(f"{field or 'the body'}: {first['msg']}", field) from None
