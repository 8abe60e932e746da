"""Messages to prompts: tokens of media in their places, positions, prefix keys and limits."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from testing.checkpoints import tiny_config
from testing.videos import encoded, numbered

from mdi.core.errors import InputError, MediaError, PromptTooLongError
from mdi.layers.rope import prompt_positions
from mdi.media import MediaPolicy, PatchSpec
from mdi.models.config import ModelConfig
from mdi.models.registry import read_config
from mdi.prompt.assembly import Prompt
from mdi.prompt.builder import PixelRange, PromptBuilder
from mdi.prompt.tokenizer import Tokenizer

TOKEN = 28 * 28
Build = Callable[..., Prompt]


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> ModelConfig:
    return read_config(json.loads((tiny_checkpoint / "config.json").read_text()))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def builder(config: ModelConfig, tokenizer: Tokenizer) -> PromptBuilder:
    return PromptBuilder(config, tokenizer, PatchSpec(), MediaPolicy(any_file=True), 1024)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seconds of 64 x 48 pixels."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    path.write_bytes(encoded(numbered(50), fps=10))
    return path


def picture(side: int, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


def asking(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What happens?"}]}]


def image(source: Any, **settings: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **settings}


def video(source: Any, **settings: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, "max_pixels": 4 * TOKEN, **settings}


def test_media_keep_their_order(builder: PromptBuilder, config: ModelConfig, clip: Path, photograph: bytes) -> None:
    still = image(photograph, max_pixels=4 * TOKEN)
    prompt = builder.build(asking(video(clip, nframes=4), still, video(clip, nframes=6)))
    assert [item.span.grid[0] for item in prompt.media] == [2, 1, 3]
    tokens = [prompt.token_ids[item.span.start] for item in prompt.media]
    assert tokens == [config.video_token_id, config.image_token_id, config.video_token_id]
    assert all(item.patches.n_tokens == item.span.length for item in prompt.media)


def test_a_placeholder_becomes_as_many_tokens_as_its_image_has(
    builder: PromptBuilder, tokenizer: Tokenizer, config: ModelConfig
) -> None:
    prompt = builder.build(asking(image(picture(112)), image(picture(56))))
    assert [item.span.length for item in prompt.media] == [16, 4]
    assert prompt.token_ids.count(config.image_token_id or 0) == 16 + 4
    text_only = len(builder.build(asking()).token_ids)
    assert len(prompt.token_ids) == text_only + 16 + 4 + 2 * 2  # each with a start and an end
    positions, delta = prompt_positions(len(prompt.token_ids), [item.span for item in prompt.media])
    assert torch.equal(prompt.positions, positions)
    assert prompt.delta == delta


def test_prefix_keys_are_those_of_the_content(builder: PromptBuilder) -> None:
    red, again, blue = (builder.build(asking(image(picture(56, color)))) for color in ("red", "red", "blue"))
    assert red.prefix_keys == again.prefix_keys
    assert red.token_ids == blue.token_ids
    [media] = red.media
    differing = [
        at for at, keys in enumerate(zip(red.prefix_keys, blue.prefix_keys, strict=True)) if len(set(keys)) > 1
    ]
    assert differing == list(range(media.span.start, media.span.start + media.span.length))
    assert min(red.prefix_keys) < 0  # no token's id


def test_limits_of_a_part_come_before_those_of_the_request(builder: PromptBuilder) -> None:
    prompt = builder.build(
        asking(image(picture(112)), image(picture(112), max_pixels=9 * TOKEN)), PixelRange(max_pixels=4 * TOKEN)
    )
    assert [item.span.length for item in prompt.media] == [4, 9]


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels"])
def test_a_limit_below_one_pixel_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="at least 1") as caught:
        PixelRange(**{name: 0})
    assert caught.value.field == name


def test_a_prompt_leaves_room_for_one_token_of_the_answer(config: ModelConfig, tokenizer: Tokenizer) -> None:
    length = len(PromptBuilder(config, tokenizer, None, MediaPolicy(), 1024).build("Hello").token_ids)
    assert PromptBuilder(config, tokenizer, None, MediaPolicy(), length + 1).build("Hello")
    with pytest.raises(PromptTooLongError, match=f"has {length} tokens and an answer needs room for one more"):
        PromptBuilder(config, tokenizer, None, MediaPolicy(), length).build("Hello")


def test_an_image_that_does_not_fit_names_its_tokens_and_the_room(builder: PromptBuilder) -> None:
    with pytest.raises(PromptTooLongError, match=r"the image takes 1600 tokens, and \d+ of .* 1024 are left"):
        builder.build(asking(image(picture(1120), max_pixels=1600 * TOKEN)))


def test_an_error_of_media_names_the_part(builder: PromptBuilder, clip: Path) -> None:
    for part, field in ((image(b"not an image"), "image"), (video(b"not a video"), "video")):
        with pytest.raises(MediaError) as caught:
            builder.build(asking(video(clip), part))
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        ({"max_images": 1}, "a request may have 1 images, and this one has 2"),
        ({"max_videos": 0}, "a request may have 0 videos, and this one has 1"),
        ({"max_images": 2, "max_videos": 1}, None),
    ],
)
def test_images_and_videos_have_limits_of_their_own(
    config: ModelConfig, tokenizer: Tokenizer, limits: Any, refused: str | None
) -> None:
    builder = PromptBuilder(config, tokenizer, PatchSpec(), MediaPolicy(**limits), 1024)
    messages = asking(image("a.png"), image("b.png"), video("c.mp4"))
    with nullcontext() if refused is None else pytest.raises(InputError, match=refused):
        builder.check(messages)


def test_a_model_without_vision_refuses_media(tokenizer: Tokenizer) -> None:
    text_only = PromptBuilder(read_config(tiny_config()), tokenizer, None, MediaPolicy(), 1024)
    with pytest.raises(InputError, match="text only: send no images"):
        text_only.check(asking(image(picture(56))))
