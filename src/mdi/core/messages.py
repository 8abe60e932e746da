"""Prompts: messages of a chat, raw text and token ids, typed once, and the one parser of what callers give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mdi.core.errors import InputError, MediaError
from mdi.core.message_details import DETAILS, NEWER_REASONING, read_details
from mdi.core.template_settings import TemplateSettings, check_settings
from mdi.core.tools import Tool
from mdi.core.unknown_fields import UnknownField, report_unknown, warn_once
from mdi.core.values import as_whole, checked_text

Role = Literal["system", "user", "assistant", "tool", "function"]
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "function",
}
"""What callers name a role."""

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
    """One message of a chat. details: its other fields that chat templates read: see
    `message_details`."""

    role: Role
    content: str | tuple[Part, ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def media(self) -> list[MediaPart]:
        """The images and videos, in order."""
        return [] if isinstance(self.content, str) else [part for part in self.content if isinstance(part, MediaPart)]

    @property
    def texts(self) -> list[str]:
        """The texts, in order."""
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content if isinstance(part, TextPart)]


Chat = Sequence[Message | Mapping[str, Any]]
"""Messages as callers give them, typed or in the chat form: see `parse_messages`."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, with settings for the chat template.

    tools: functions that the model may call. marks: of calls and thoughts, which the answer's text has also where they
    are special tokens and others are left out.
    add_generation_prompt: the prompt ends where the assistant's answer begins. continue_final_message: it ends within
    the last message, which the answer continues. Raises InputError for settings that no template may get, and for both
    of these together.
    """

    messages: Chat
    settings: TemplateSettings = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: tuple[Tool, ...] = ()
    marks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self.settings)
        if self.add_generation_prompt and self.continue_final_message:
            raise InputError(
                "an answer cannot both continue the last message and begin a new one: set add_generation_prompt to "
                "false",
                "continue_final_message",
            )


@dataclass(frozen=True, slots=True)
class RawText:
    """A text that is continued exactly as it is, without a chat template.

    The tokenizer adds its own special tokens, such as a BOS token, and recognises special tokens by their names in the
    text. Text of strangers belongs into messages instead, where it never becomes a special token.
    add_special_tokens: False adds none.
    """

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids that are continued exactly as they are. Nothing is added to them."""

    ids: tuple[int, ...]


PromptInput = str | RawText | TokenIds | Conversation | Chat
"""What a request may ask. A plain string is one user message where the model has a chat template."""

WITHOUT_EFFECT = ("refusal", "annotations")
"""OpenAI's fields of its own answers, which clients send back."""

MAY_BE_EMPTY = ("assistant", "tool", "function")  # roles whose messages may have no content

KINDS = {
    "text": "text",
    "refusal": "text",
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
}
PIXELS = ("min_pixels", "max_pixels")
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "text": (),
    "image": PIXELS,
    "video": ("fps", "nframes", *PIXELS, "total_pixels"),
}
"""The optional fields of a part, by its type."""

DETAIL_LEVELS = (None, "auto", "low", "high")  # OpenAI's `detail`, which changes nothing here
MAX_SETTING = 2**53


def parse_messages(messages: Any, unknown: UnknownField = warn_once) -> tuple[Message, ...]:
    """Reads messages in the chat form. unknown: called with the path of each unknown field.

    A message has a role and a content: a string, or a list of parts:

    {"type": "text", "text": string}
    {"type": "image", "image": path | URL | bytes}, optionally with min_pixels and max_pixels
    {"type": "video", "video": path | URL | bytes | list of images}, optionally with fps or nframes, min_pixels,
        max_pixels and total_pixels

    OpenAI's {"type": "image_url", "image_url": {"url": URL}} and "video_url" mean the same; their settings stand inside
    the object or beside it. The content of the assistant and of tools may be missing. Messages and parts that are typed
    already stay as they are.

    Raises InputError, or MediaError for an image or a video, naming the field in the form messages[0].content[1].image.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError("messages must be a list with at least one message", "messages")
    return tuple(_message(message, f"messages[{index}]", unknown) for index, message in enumerate(messages))


def _message(message: Any, path: str, unknown: UnknownField) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or "role" not in message:
        raise InputError(f"{path} must have a role and a content", path)
    report_unknown(message, ("role", "content", "audio", NEWER_REASONING, *DETAILS, *WITHOUT_EFFECT), path, unknown)
    name = message["role"]
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise InputError(f"unknown role {name!r}: use one of {', '.join(ROLES)}", f"{path}.role")
    if message.get("audio") is not None:
        raise InputError(f"{path}.audio is not supported: send the words as content", f"{path}.audio")
    content = message.get("content")
    if role in MAY_BE_EMPTY and content in (None, [], ()):
        content = ""
    elif "content" not in message:
        raise InputError(f"{path} must have a role and a content", path)
    return Message(role, _content(content, f"{path}.content", unknown), read_details(message, path))


def _content(content: Any, path: str, unknown: UnknownField) -> str | tuple[Part, ...]:
    if isinstance(content, str):
        return checked_text(content, path)
    if not isinstance(content, (list, tuple)) or not content:
        raise InputError(f"{path} must be a string or a list of parts", path)
    return tuple(_part(part, f"{path}[{index}]", unknown) for index, part in enumerate(content))


def _part(part: Any, path: str, unknown: UnknownField) -> Part:
    if isinstance(part, Part):
        return part
    name = part.get("type") if isinstance(part, Mapping) else None
    kind = KINDS.get(name) if isinstance(name, str) else None
    if name is None or kind is None:
        given = f", not {name!r}" if isinstance(name, str) else ""
        raise InputError(f"{path} must be of type text, image or video{given}", path)
    report_unknown(part, ("type", name, *SETTINGS[kind]), path, unknown)
    value, place = part.get(name), f"{path}.{name}"
    if kind == "text":
        if not isinstance(value, str):
            raise InputError(f"{place} must be a string", place)
        return TextPart(checked_text(value, place))
    inside = value if name != kind and isinstance(value, Mapping) else {}
    settings = _settings(kind, part, path, inside, place, unknown)
    source = _url(value, place) if name != kind else value
    if kind == "image":
        return ImagePart(_image_source(source, place), **settings)
    return _video(source, settings, path, place)


def _settings(
    kind: str, part: Mapping[str, Any], path: str, inside: Mapping[str, Any], place: str, unknown: UnknownField
) -> dict[str, Any]:
    """Settings of an image or a video, which stand in its part, or inside the object of its URL."""
    report_unknown(inside, ("url", "detail", *SETTINGS[kind]), place, unknown)
    if (detail := inside.get("detail")) not in DETAIL_LEVELS:
        raise InputError(f"{place}.detail must be auto, low or high, got {detail!r}", f"{place}.detail")
    settings = {}
    for name in SETTINGS[kind]:
        beside, within = _setting(name, part.get(name), path), _setting(name, inside.get(name), place)
        if None not in (beside, within) and beside != within:
            raise InputError(
                f"{path}.{name} is {beside} and {place}.{name} is {within}: send one of them", f"{place}.{name}"
            )
        settings[name] = within if beside is None else beside
    return settings


def _video(source: Any, settings: dict[str, Any], path: str, place: str) -> VideoPart:
    if not isinstance(source, (list, tuple)) or not source:
        return VideoPart(_source(source, place, "a path, a URL, a video's bytes, or a list of images"), **settings)
    if settings["nframes"] is not None:
        raise InputError("nframes is for video files: of a list every frame is taken", f"{path}.nframes")
    frames = [_image_source(frame, f"{place}[{index}]") for index, frame in enumerate(source)]
    return VideoPart(tuple(frames), **settings)


def _url(given: Any, place: str) -> str:
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str) or not url:
        raise MediaError(f"{place} must have a url", place)
    return url


def _image_source(source: Any, place: str) -> MediaSource:
    return _source(source, place, "a path, a URL, or an image's bytes")


def _source(source: Any, place: str, expected: str) -> MediaSource:
    if not isinstance(source, (str, bytes, Path)) or not source:
        raise MediaError(f"{place} must be {expected}", place)
    return checked_text(source, place) if isinstance(source, str) else source


def _setting(name: str, value: Any, path: str) -> Any:
    if value is None:
        return None
    place, number = f"{path}.{name}", as_whole(value)
    kinds, expected = ((int, float), "a number") if name == "fps" else ((int,), "a whole number")
    if isinstance(number, bool) or not isinstance(number, kinds):
        raise InputError(f"{place} must be {expected}, got {value!r}", place)
    if not abs(number) <= MAX_SETTING:
        raise InputError(f"{place} must be {expected} of at most {MAX_SETTING}", place)
    return number
