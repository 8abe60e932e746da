"""Qwen3-VL through whole engines: images and videos give the answers of transformers, however layers are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from testing.checkpoints import tiny_deepstack_config
from testing.videos import encoded, numbered

from mdi import Engine, SamplingParams
from mdi.bench.peers import Transformers
from mdi.bench.verify import verify
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source

GREEDY = SamplingParams(temperature=0, max_tokens=8)
Chats = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three layers: on three nodes, features of two pass a link."""
    path = tmp_path_factory.mktemp("qwen3-vl") / "model"
    return write_random_checkpoint(path, tiny_deepstack_config(num_hidden_layers=3))


@pytest.fixture(scope="module")
def chats(photograph: bytes) -> Chats:
    """Of words, photographs, and videos behind text, of which one has an odd number of frames."""
    image = {"type": "image", "image": photograph, "max_pixels": 200_000}
    media: dict[str, list[dict[str, Any]]] = {
        "text": [],
        "image": [image],
        "images": [image, {"type": "text", "text": "and"}, {**image, "max_pixels": 70_000}, image],
        "video": [{"type": "video", "video": encoded(numbered(30), fps=10)}],
        "odd video": [{"type": "text", "text": "Look: "}, {"type": "video", "video": encoded(numbered(25), fps=9)}],
        "both": [image, {"type": "video", "video": encoded(numbered(8), fps=3)}],
    }
    text = {"type": "text", "text": "What is at hand?"}
    return {name: [{"role": "user", "content": [*parts, text]}] for name, parts in media.items()}


@pytest.mark.parametrize("name", ["text", "image", "images", "video", "odd video", "both"])
def test_logits_and_tokens_are_those_of_transformers(name: str, checkpoint: Path, chats: Chats) -> None:
    report = verify(open_source(checkpoint), chats[name], dtype="float32", n_nodes=3, max_tokens=8)
    assert report.same_prompt
    assert report.relative < 1e-4
    assert report.ours == report.theirs


@pytest.mark.parametrize("n_nodes", [1, 3])
def test_engines_give_the_same_answers(n_nodes: int, checkpoint: Path, chats: Chats) -> None:
    theirs = Transformers(open_source(checkpoint))
    with Engine(checkpoint, dtype="float32", n_nodes=n_nodes, sequence_length=2048) as engine:
        running = {name: engine.submit(chat, GREEDY) for name, chat in chats.items()}
        for name, stream in running.items():
            assert stream.completion().token_ids == theirs.answer(chats[name], 8), name
