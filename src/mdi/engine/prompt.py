"""Messages to what the model reads: token ids, rotary positions, patch rows. Runs in the engine's media threads.

Knows the tokenizer and the media room; nothing of slots, batches or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mdi.engine.tokenizer import Tokenizer
from mdi.errors import InputError, MediaError, PromptTooLongError
from mdi.media import MediaPolicy, Patches, PatchSpec, decode_image, fetch, image_patches, smart_resize
from mdi.model.config import ModelConfig
from mdi.model.rope import MediaSpan, prompt_positions

Message = dict[str, Any]
"""A role and a content: text, or parts {"type": "text", "text"} and {"type": "image", "image": path | URL | bytes}."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Media:
    """One image of a prompt: its patch rows, and where its tokens stand."""

    span: MediaSpan
    patches: Patches


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model. positions: int64 [3, tokens]; delta: see `rope.prompt_positions`."""

    token_ids: tuple[int, ...]
    positions: Tensor
    delta: int
    media: tuple[Media, ...]


@dataclass(frozen=True)
class PixelRange:
    """A request's own limits on an image's area in pixels; None is the server's. Raises InputError below 1."""

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for field, pixels in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            if pixels is not None and pixels < 1:
                raise InputError(f"{field} must be at least 1, got {pixels}", field)


class PromptBuilder:
    """Turns messages into prompts that fit `sequence_length`."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        spec: PatchSpec | None,
        policy: MediaPolicy,
        sequence_length: int,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._spec = spec
        self._policy = policy
        self._sequence_length = sequence_length

    def check(self, prompt: str | Sequence[Message]) -> None:
        """Raises InputError for what can be told without fetching, decoding or tokenising anything."""
        if not isinstance(prompt, str):
            check_messages(prompt)
            if not self._tokenizer.has_chat_template:
                raise InputError("this model has no chat template: send a plain prompt instead of messages", "messages")
            if self._spec is None and _parts_with(prompt, "image"):
                raise InputError("this model reads text only: send no images", "messages")

    def build(self, prompt: str | Sequence[Message], pixels: PixelRange = PixelRange()) -> Prompt:
        """Fetches, decodes, tokenises. A plain string is one user message where the model has a chat template.

        Raises MediaError for unusable media and PromptTooLongError for what does not fit; nothing is ever cut.
        """
        if isinstance(prompt, str) and not self._tokenizer.has_chat_template:
            return self._assemble(self._tokenizer.encode(prompt), [])
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        token_ids = self._tokenizer.encode_chat(messages)
        self._check_length(len(token_ids))
        images = _parts_with(messages, "image")
        if token_ids.count(self._config.image_token_id or -1) != len(images):
            raise InputError("the model's chat template does not place these images", "messages")
        room = self._sequence_length - len(token_ids)
        return self._assemble(token_ids, [self._load(part, pixels, room) for part in images])

    def _load(self, part: dict[str, Any], pixels: PixelRange, room: int) -> Patches:
        assert self._spec is not None
        spec = self._spec.with_pixels(
            part.get("min_pixels", pixels.min_pixels), part.get("max_pixels", pixels.max_pixels)
        )
        image = decode_image(fetch(part["image"], self._policy), self._policy)
        factor = spec.patch_size * spec.merge_size
        height, width = smart_resize(image.height, image.width, factor, spec.min_pixels, spec.max_pixels)
        if (n_tokens := height * width // factor**2) > room:  # told before any patch is made
            raise PromptTooLongError(
                f"the image takes {n_tokens} tokens, and {max(room, 0)} of the sequence length's "
                f"{self._sequence_length} are left: lower max_pixels, or raise the server's --sequence-length",
                "messages",
            )
        return image_patches(image, spec)

    def _assemble(self, token_ids: list[int], images: Sequence[Patches]) -> Prompt:
        """Widens every placeholder to its image's tokens and lays out the positions."""
        merge_size = self._config.vision.merge_size if self._config.vision else 1
        remaining = iter(images)
        expanded: list[int] = []
        media: list[Media] = []
        for token in token_ids:
            if images and token == self._config.image_token_id:
                patches = next(remaining)
                span = MediaSpan(len(expanded), patches.grid, merge_size)
                media.append(Media(span, patches))
                expanded += [token] * span.length
            else:
                expanded.append(token)
        self._check_length(len(expanded))
        positions, delta = prompt_positions(len(expanded), [item.span for item in media])
        return Prompt(tuple(expanded), positions, delta, tuple(media))

    def _check_length(self, n_tokens: int) -> None:
        if n_tokens == 0:
            raise InputError("the prompt is empty", "prompt")
        if n_tokens >= self._sequence_length:
            raise PromptTooLongError(
                f"the prompt has {n_tokens} tokens and an answer needs room for one more, but the sequence length "
                f"is {self._sequence_length}: shorten the prompt, or raise the server's --sequence-length",
                "messages",
            )


def check_messages(messages: Sequence[Message]) -> None:
    """Raises InputError, naming the field, for messages of the wrong form."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError("messages must be a list with at least one message", "messages")
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise InputError(f"{field} must have a role and a content", field)
        if message["role"] not in ROLES:
            raise InputError(f"unknown role {message['role']!r}: use one of {', '.join(ROLES)}", f"{field}.role")
        _check_content(message["content"], f"{field}.content")


def _check_content(content: Any, field: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise InputError(f"{field} must be a string or a list of parts", field)
    for index, part in enumerate(content):
        _check_part(part, f"{field}[{index}]")


def _check_part(part: Any, field: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f"{field}.text must be a string", f"{field}.text")
    elif kind == "image":
        if not isinstance(part.get("image"), (str, bytes, Path)) or not part["image"]:
            raise MediaError(f"{field}.image must be a path, a URL, or an image's bytes", f"{field}.image")
    elif kind == "video":
        raise MediaError("video input is not supported yet: send frames as images", field)
    else:
        raise InputError(f"{field} must be of type text or image", field)


def _parts_with(messages: Sequence[Message], kind: str) -> list[dict[str, Any]]:
    return [
        part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == kind
    ]
