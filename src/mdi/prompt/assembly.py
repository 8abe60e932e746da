"""Prompts ready for the model: token ids, rotary positions, and the images and videos among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from struct import pack

from torch import Tensor

from mdi.layers.rope import MediaSpan, prompt_positions
from mdi.media import Patches
from mdi.models.config import ModelConfig
from mdi.prompt.tokenizer import Thoughts, Tokenizer


@dataclass(frozen=True)
class Media:
    """One image or video of a prompt, or one grid of a video: the span of its tokens, and its rows of patches."""

    span: MediaSpan
    patches: Patches


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model. positions: int64 [3, tokens]; delta: see `rope.prompt_positions`.

    thoughts: how the model's thoughts may begin; None where none may.
    """

    token_ids: tuple[int, ...]
    positions: Tensor
    delta: int
    media: tuple[Media, ...]
    thoughts: Thoughts | None = None

    def without_rows(self) -> Prompt:
        """The same prompt, without the rows of its media: they are encoded."""
        return replace(self, media=tuple(replace(item, patches=item.patches.without_rows()) for item in self.media))

    @cached_property
    def prefix_keys(self) -> tuple[int, ...]:
        """One for each token: its id, or, for a token of an image or a video, a number that its content decides."""
        keys = list(self.token_ids)
        for item in self.media:
            content = -int.from_bytes(item.patches.digest + pack("<d", item.span.time_step)) - 1
            keys[item.span.start : item.span.start + item.span.length] = [content] * item.span.length
        return tuple(keys)


def assemble(token_ids: Sequence[int], loaded: Sequence[Patches], config: ModelConfig, tokenizer: Tokenizer) -> Prompt:
    """The prompt, each placeholder repeated for the tokens of its image or video. loaded: in order of appearance."""
    assembly = _Assembly(config, tokenizer)
    timed = config.vision is not None and config.vision.timestamps
    remaining = iter(loaded)
    for token in _without_marks(token_ids, config) if loaded and timed else token_ids:
        if not loaded or token not in (config.image_token_id, config.video_token_id):
            assembly.ids.append(token)
        elif timed and token == config.video_token_id:
            assembly.place_by_time(token, next(remaining))
        else:
            assembly.place(token, next(remaining))
    positions, delta = prompt_positions(len(assembly.ids), [item.span for item in assembly.media])
    return Prompt(tuple(assembly.ids), positions, delta, tuple(assembly.media))


def media_span(start: int, patches: Patches, config: ModelConfig) -> MediaSpan:
    """The tokens of an image or a video, and how far its frames stand apart."""
    assert config.vision
    rate = config.vision.positions_per_second
    step = 1.0 if rate is None or patches.seconds is None else rate * patches.seconds
    return MediaSpan(start, patches.grid, config.vision.merge_size, step)


class _Assembly:
    """A prompt that grows."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.ids: list[int] = []
        self.media: list[Media] = []
        self._config = config
        self._tokenizer = tokenizer

    def place(self, token: int, patches: Patches) -> None:
        """Adds the tokens of an image or a video."""
        self.media.append(Media(media_span(len(self.ids), patches, self._config), patches))
        self.ids += [token] * patches.n_tokens

    def place_by_time(self, token: int, video: Patches) -> None:
        """Adds a video grid after grid, each as an image behind its time: Qwen3-VL, as transformers 4.57 has it."""
        start, end = self._config.vision_start_token_id, self._config.vision_end_token_id
        assert start is not None
        assert end is not None
        for time_s, patches in zip(video.times_s, video.along_time(), strict=True):
            self.ids = [*self._tokenizer.with_text(self.ids, f"<{time_s:.1f} seconds>"), start]
            self.place(token, patches)
            self.ids.append(end)


def _without_marks(token_ids: Sequence[int], config: ModelConfig) -> list[int]:
    """Drops what the template writes around a video: each of its grids gets marks of its own."""
    whole = [config.vision_start_token_id, config.video_token_id, config.vision_end_token_id]
    kept, index = list[int](), 0
    while index < len(token_ids):
        marked = list(token_ids[index : index + 3]) == whole
        kept.append(token_ids[index + marked])
        index += 3 if marked else 1
    return kept
