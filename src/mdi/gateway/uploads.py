"""Requests sent as a form: files become the images and videos of messages."""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile

from mdi.core.errors import InputError
from mdi.gateway.json_body import read_json

UPLOAD_FIELDS = ("image", "images", "video", "videos", "file", "files")


@dataclass(frozen=True)
class Upload:
    """A file of a form. kind: "image" or "video"."""

    kind: str
    name: str | None
    content: bytes


async def read_form(form: FormData) -> dict[str, Any]:
    """The fields of a form as JSON would give them: every value is JSON or plain text, files are in the messages.

    Files become the image and video parts that have no source. Without `messages`, `prompt` and the files make one
    user message. Raises InputError for contradictory fields, and for files without one clear place.
    """
    uploads = [
        Upload(_kind(field, part), part.filename, await part.read())
        for field, part in form.multi_items()
        if isinstance(part, UploadFile)
    ]
    fields = {name: await _value(name, text) for name, text in form.multi_items() if isinstance(text, str)}
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
            _place(fields["messages"], kind, [upload for upload in uploads if upload.kind == kind])
    return fields


def _kind(field: str, file: UploadFile) -> str:
    """A file is a video if its field, its content type or its name says so."""
    if field not in UPLOAD_FIELDS:
        raise InputError(f"files come in the fields {', '.join(UPLOAD_FIELDS)}, not {field!r}", field)
    types = (file.content_type or "", mimetypes.guess_type(file.filename or "")[0] or "")
    return "video" if field in ("video", "videos") or any(name.startswith("video/") for name in types) else "image"


async def _value(name: str, text: str) -> Any:
    if name == "prompt" or (name == "stop" and not text.startswith("[")):
        return text
    return await read_json(text.encode(), f"the form field {name}", name)


def _place(messages: Any, kind: str, uploads: Sequence[Upload]) -> None:
    """Puts each file into the part that names it; parts without a source take the other files in order."""
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
    """All content parts of messages that are not checked yet."""
    listed = messages if isinstance(messages, list) else []
    contents = [message.get("content") for message in listed if isinstance(message, dict)]
    return [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
