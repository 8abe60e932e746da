"""The engine keeps encoded images and shared prefixes from one request to the next, and answers as without them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mdi import Engine, SamplingParams
from mdi.models.qwen2_vl import VisionTransformer

GREEDY = SamplingParams(temperature=0, max_tokens=12)
Message = dict[str, Any]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine(tiny_checkpoint, n_nodes=2, dtype="float32", sequence_length=512, max_sequences=3) as engine:
        yield engine


@pytest.fixture
def fresh(tiny_checkpoint: Path) -> Iterator[Engine]:
    """An engine with empty caches, which keeps nothing."""
    with Engine(tiny_checkpoint, dtype="float32", sequence_length=512, max_sequences=1, vision_cache_bytes=0) as engine:
        yield engine


def turned(image: bytes, degrees: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).rotate(degrees).save(buffer, "PNG")
    return buffer.getvalue()


def user(*parts: bytes | str) -> Message:
    kinds = {bytes: "image", str: "text"}
    return {"role": "user", "content": [{"type": kinds[type(part)], kinds[type(part)]: part} for part in parts]}


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every image that a vision tower of this process begins to encode."""
    begun: list[int] = []
    original = VisionTransformer.encode_steps

    def counting(tower: VisionTransformer, rows: torch.Tensor, grid: Any) -> Any:
        begun.append(len(rows))
        return original(tower, rows, grid)

    monkeypatch.setattr(VisionTransformer, "encode_steps", counting)
    return begun


def test_a_conversation_goes_on_without_computing_it_again(engine: Engine, fresh: Engine, photograph: bytes) -> None:
    messages = [user(photograph, "What is this?")]
    answers = []
    for question in ("And where?", "Since when?", ""):
        answers.append(engine.chat(messages, GREEDY))
        assert answers[-1].token_ids == fresh.chat(messages, GREEDY).token_ids
        messages += [{"role": "assistant", "content": answers[-1].text}, user(question)]
    first, second, third = (answer.usage for answer in answers)
    assert first.cached_tokens == 0
    assert first.prompt_tokens <= second.cached_tokens < second.prompt_tokens
    assert second.prompt_tokens <= third.cached_tokens < third.prompt_tokens


def test_another_image_is_another_prefix(engine: Engine, fresh: Engine, photograph: bytes) -> None:
    for image in (photograph, turned(photograph, 180), photograph):
        messages = [user(image, "Look closely at this, and say what it is.")]
        assert engine.chat(messages, GREEDY).token_ids == fresh.chat(messages, GREEDY).token_ids


def test_samples_and_concurrent_questions_share_what_they_can(engine: Engine, fresh: Engine, photograph: bytes) -> None:
    asked = [[user(photograph, f"Tell me {what} about it, please.")] for what in ("all", "more", "less", "something")]
    warm = SamplingParams(temperature=1, seed=4, max_tokens=20, n=3)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda messages: engine.chat(messages, warm), asked))
    for messages, answer in zip(asked, together, strict=True):
        expected = fresh.chat(messages, warm)
        assert [sample.token_ids for sample in answer.samples] == [sample.token_ids for sample in expected.samples]


def test_an_image_is_encoded_once(engine: Engine, photograph: bytes, encodes: list[int]) -> None:
    new = turned(photograph, 90)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: engine.chat([user(text, new, new)], GREEDY), ("a", "b", "c", "d")))
    assert len(encodes) == 1


def test_nothing_is_kept_with_a_limit_of_zero(fresh: Engine, photograph: bytes, encodes: list[int]) -> None:
    for text in ("a", "b"):
        fresh.chat([user(text, photograph)], GREEDY)
    assert len(encodes) == 2
