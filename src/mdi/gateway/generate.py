"""The guide's routes: POST /generate and POST /generate/multimodal, which answer {"samples": [text, ...]}."""

from __future__ import annotations

import json
import mimetypes
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, Response

from mdi.core.errors import InputError
from mdi.core.messages import Chat, parse_messages
from mdi.engine import Piece
from mdi.gateway.schemas import GenerateRequest, MultimodalRequest
from mdi.gateway.streaming import TextEngine, events, whole

UPLOAD_FIELDS = ("image", "images", "video", "videos", "file", "files")
MAX_UPLOADS = 64


def router(engine: TextEngine, timeout_s: float | None) -> APIRouter:
    routes = APIRouter()

    async def answer(request: Request, prompt: str | Chat, body: GenerateRequest | MultimodalRequest) -> Response:
        running = engine.submit(prompt, body.params(), min_pixels=body.min_pixels, max_pixels=body.max_pixels)
        if body.stream:
            return await events(request, running, timeout_s, _render)
        completion = await whole(request, running, timeout_s)
        return JSONResponse({"samples": [sample.text for sample in completion.samples]})

    @routes.post("/generate")
    async def generate(request: Request, body: GenerateRequest) -> Response:
        return await answer(request, body.prompt, body)

    @routes.post("/generate/multimodal")
    async def generate_multimodal(request: Request) -> Response:
        body = await _multimodal_body(request)
        return await answer(request, parse_messages(body.messages, strict=True), body)

    return routes


async def _render(pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
    async for piece in pieces:
        yield {"index": piece.index, "text": piece.text, "finish_reason": piece.finish_reason}


async def _multimodal_body(request: Request) -> MultimodalRequest:
    """The request from JSON, or from a form with files."""
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        return MultimodalRequest.model_validate(_json(await request.body(), "the body"))
    async with request.form(max_files=MAX_UPLOADS, max_part_size=sys.maxsize) as form:  # the gate limits the whole
        return await _from_form(form)


def _json(text: str | bytes, name: str, field: str | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{name} is not valid JSON", field) from None


async def _from_form(form: FormData) -> MultimodalRequest:
    """Form fields as in JSON, each value JSON or plain text; files stand for the image and video parts that lack one.

    Without `messages`, `prompt` and the files make one user message.
    """
    uploads = [
        _Upload(_kind_of(field, part), part.filename, await part.read())
        for field, part in form.multi_items()
        if isinstance(part, UploadFile)
    ]
    fields = {name: _value(name, text) for name, text in form.multi_items() if isinstance(text, str)}
    prompt = fields.pop("prompt", None)
    if "messages" not in fields:
        if prompt is None:
            raise InputError("a form needs messages, or a prompt", "messages")
        parts = [{"type": upload.kind, upload.kind: upload.content} for upload in uploads]
        fields["messages"] = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
    elif prompt is not None:
        raise InputError("send messages or a prompt, not both", "prompt")
    else:
        for kind in ("image", "video"):
            _place_uploads(fields["messages"], kind, [upload for upload in uploads if upload.kind == kind])
    return MultimodalRequest.model_validate(fields)


@dataclass(frozen=True)
class _Upload:
    """A file of a form. kind: "image" or "video"."""

    kind: str
    name: str | None
    content: bytes


def _kind_of(field: str, file: UploadFile) -> str:
    """A video is what comes in a field of that name, what is sent as video/*, or what is named like one."""
    if field not in UPLOAD_FIELDS:
        raise InputError(f"files come in the fields {', '.join(UPLOAD_FIELDS)}, not {field!r}", field)
    told, named = file.content_type or "", mimetypes.guess_type(file.filename or "")[0] or ""
    is_video = field in ("video", "videos") or told.startswith("video/") or named.startswith("video/")
    return "video" if is_video else "image"


def _value(name: str, text: str) -> Any:
    if name in ("prompt", "stop") and not (name == "stop" and text.startswith("[")):
        return text
    return _json(text, f"the form field {name}", name)


def _place_uploads(messages: Any, kind: str, uploads: Sequence[_Upload]) -> None:
    """A part that names an uploaded file gets it; parts without a source take the other files in order."""
    parts = [part for part in _parts(messages) if part.get("type") == kind]
    named = [part[kind] for part in parts if isinstance(part.get(kind), str)]
    by_name = {upload.name: upload.content for upload in uploads if upload.name in named}
    others = [upload.content for upload in uploads if upload.name not in named]
    if len(by_name) + len(others) < len(uploads):
        raise InputError(f"{kind} parts name a file, but several uploaded files have that name", "messages")
    unplaced = iter(others)
    for part in parts:
        source = part.get(kind)
        if isinstance(source, str) and source in by_name:
            part[kind] = by_name[source]
        elif not source:
            part[kind] = next(unplaced, None)
            if part[kind] is None:
                raise InputError(f"there are more {kind} parts than uploaded {kind} files", "messages")
    if left := len(list(unplaced)):
        raise InputError(
            f"{len(uploads)} {kind} files were uploaded, but the messages place {len(uploads) - left}", "messages"
        )


def _parts(messages: Any) -> list[dict[str, Any]]:
    """All content parts of messages nobody has checked yet."""
    listed = messages if isinstance(messages, list) else []
    contents = [message.get("content") for message in listed if isinstance(message, dict)]
    return [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
