"""Prompts: messages of a chat, raw text and token ids, typed once, and the one parser of what callers give."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mdi.core.errors import InputError, MediaError

Role = Literal["system", "user", "assistant"]
ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "developer": "system"}
"""What callers name a role; "developer" is OpenAI's newer name of "system"."""

MediaSource = str | bytes | Path
"""Where an image or a video comes from: a path, a URL (http, https, file or data), or its bytes."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a message."""

    kind: ClassVar[Literal["text"]] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image of a message. min_pixels, max_pixels: its area after resizing; None is the request's limit."""

    kind: ClassVar[Literal["image"]] = "image"
    source: MediaSource
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class VideoPart:
    """A video of a message: a file, or its frames as a tuple of images.

    fps or nframes: how many frames to take from a file. min_pixels, max_pixels: area of a frame after resizing.
    total_pixels: area of all frames together. None is the request's or the checkpoint's value.
    """

    kind: ClassVar[Literal["video"]] = "video"
    source: MediaSource | tuple[MediaSource, ...]
    fps: float | None = None
    nframes: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None


MediaPart = ImagePart | VideoPart
Part = TextPart | ImagePart | VideoPart


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: Role
    content: str | tuple[Part, ...]

    @property
    def media(self) -> list[MediaPart]:
        """The images and videos, in order."""
        return [] if isinstance(self.content, str) else [part for part in self.content if isinstance(part, MediaPart)]


Chat = Sequence[Message | Mapping[str, Any]]
"""Messages as callers give them, typed or in the chat form: see `parse_messages`."""


@dataclass(frozen=True, slots=True)
class RawText:
    """A text that is continued exactly as it is, without a chat template.

    The tokenizer adds its own special tokens, such as a BOS token, and recognises special tokens by their names in the
    text. Text of strangers belongs into messages instead, where it never becomes a special token.
    """

    text: str


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids that are continued exactly as they are. Nothing is added to them."""

    ids: tuple[int, ...]


PromptInput = str | RawText | TokenIds | Chat
"""What a request may ask. A plain string is one user message where the model has a chat template."""

MESSAGE_FIELDS = ("role", "content")
KINDS = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}
PIXELS = ("min_pixels", "max_pixels")
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "text": (),
    "image": PIXELS,
    "video": ("fps", "nframes", *PIXELS, "total_pixels"),
}
"""The optional fields of a part, by its type."""

SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half of a surrogate pair, which no tokenizer takes


def parse_messages(messages: Any, *, strict: bool = False) -> tuple[Message, ...]:
    """Reads messages in the chat form. strict: unknown fields are refused; otherwise they are ignored.

    A message has a role and a content: a string, or a list of parts:

    {"type": "text", "text": string}
    {"type": "image", "image": path | URL | bytes}, optionally with min_pixels and max_pixels
    {"type": "video", "video": path | URL | bytes | list of images}, optionally with fps or nframes, min_pixels,
        max_pixels and total_pixels

    OpenAI's {"type": "image_url", "image_url": {"url": URL}} and "video_url" mean the same. Messages and parts that are
    typed already stay as they are.

    Raises InputError, or MediaError for an image or a video, naming the field in the form messages[0].content[1].image.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError("messages must be a list with at least one message", "messages")
    return tuple(_message(message, f"messages[{index}]", strict) for index, message in enumerate(messages))


def _message(message: Any, path: str, strict: bool) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise InputError(f"{path} must have a role and a content", path)
    if strict:
        _refuse_unknown(message, MESSAGE_FIELDS, path)
    if "role" not in message or "content" not in message:
        raise InputError(f"{path} must have a role and a content", path)
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(dict.fromkeys(ROLES.values()))
        raise InputError(f"unknown role {role!r}: use one of {known}", f"{path}.role")
    return Message(ROLES[role], _content(content, f"{path}.content", strict))


def _content(content: Any, path: str, strict: bool) -> str | tuple[Part, ...]:
    if isinstance(content, str):
        return checked_text(content, path)
    if not isinstance(content, (list, tuple)) or not content:
        raise InputError(f"{path} must be a string or a list of parts", path)
    return tuple(_part(part, f"{path}[{index}]", strict) for index, part in enumerate(content))


def _part(part: Any, path: str, strict: bool) -> Part:
    if isinstance(part, Part):
        return part
    name = part["type"] if isinstance(part, Mapping) and isinstance(part.get("type"), str) else ""
    kind = KINDS.get(name)
    if kind is None:
        raise InputError(f"{path} must be of type text, image or video", path)
    if strict:
        _refuse_unknown(part, ("type", name, *SETTINGS[kind]), path)
    value, field = part.get(name), f"{path}.{name}"
    if kind == "text":
        if not isinstance(value, str):
            raise InputError(f"{field} must be a string", field)
        return TextPart(checked_text(value, field))
    source = _url(value, field) if name != kind else value
    settings = {name: _setting(name, part.get(name), path) for name in SETTINGS[kind]}
    if kind == "image":
        return ImagePart(_image_source(source, field), **settings)
    return _video(source, settings, path, field)


def _video(source: Any, settings: dict[str, Any], path: str, field: str) -> VideoPart:
    if not isinstance(source, (list, tuple)) or not source:
        return VideoPart(_source(source, field, "a path, a URL, a video's bytes, or a list of images"), **settings)
    if settings["nframes"] is not None:
        raise InputError("nframes is for video files: of a list every frame is taken", f"{path}.nframes")
    frames = [_image_source(frame, f"{field}[{index}]") for index, frame in enumerate(source)]
    return VideoPart(tuple(frames), **settings)


def _url(given: Any, field: str) -> str:
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str) or not url:
        raise MediaError(f"{field} must have a url", field)
    return url


def _image_source(source: Any, field: str) -> MediaSource:
    return _source(source, field, "a path, a URL, or an image's bytes")


def _source(source: Any, field: str, expected: str) -> MediaSource:
    if not isinstance(source, (str, bytes, Path)) or not source:
        raise MediaError(f"{field} must be {expected}", field)
    return checked_text(source, field) if isinstance(source, str) else source


def _setting(name: str, value: Any, path: str) -> Any:
    kinds, expected = ((int, float), "a number") if name == "fps" else ((int,), "a whole number")
    if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
        raise InputError(f"{path}.{name} must be {expected}, got {value!r}", f"{path}.{name}")
    return value


def checked_text(text: str, field: str) -> str:
    """The text. Raises InputError, naming the field, for half of a surrogate pair."""
    if not text.isascii() and SURROGATE.search(text):  # nothing is scanned in a base64 image
        raise InputError(f"{field} holds half of a surrogate pair, which is no text", field)
    return text


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], path: str) -> None:
    if unknown := next((field for field in given if field not in known), None):
        raise InputError(f"unknown field {path}.{unknown}", f"{path}.{unknown}")
