"""Qwen2.5-VL through whole engines: images and videos give the answers of transformers, on one node and on three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from testing.checkpoints import tiny_windowed_config
from testing.videos import encoded, numbered

from mdi import Engine, SamplingParams
from mdi.bench.peers import Transformers
from mdi.bench.verify import verify
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("qwen2-5-vl") / "model", tiny_windowed_config())


@pytest.fixture(scope="module")
def messages(photograph: bytes) -> dict[str, list[dict[str, Any]]]:
    """Of a photograph, two of them, and videos whose frames stand apart by other times."""
    text = {"type": "text", "text": "What is at hand?"}
    media = {
        "image": [{"type": "image", "image": photograph}],
        "images": [{"type": "image", "image": photograph}, {"type": "image", "image": photograph}],
        "video": [{"type": "video", "video": encoded(numbered(30), fps=10)}],
        "slow video": [{"type": "video", "video": encoded(numbered(30), fps=3)}],
    }
    return {name: [{"role": "user", "content": [*parts, text]}] for name, parts in media.items()}


@pytest.mark.parametrize("name", ["image", "images", "video", "slow video"])
def test_logits_and_tokens_are_those_of_transformers(
    name: str, checkpoint: Path, messages: dict[str, list[dict[str, Any]]]
) -> None:
    report = verify(open_source(checkpoint), messages[name], dtype="float32", n_nodes=2, max_tokens=8)
    assert report.same_prompt
    assert report.relative < 1e-4
    assert report.ours == report.theirs


@pytest.mark.parametrize("n_nodes", [1, 3])
def test_engines_give_the_same_answers(
    n_nodes: int, checkpoint: Path, messages: dict[str, list[dict[str, Any]]]
) -> None:
    theirs = Transformers(open_source(checkpoint))
    with Engine(checkpoint, dtype="float32", n_nodes=n_nodes, sequence_length=2048, any_file=True) as engine:
        running = {name: engine.submit(chat, GREEDY) for name, chat in messages.items()}
        for name, stream in running.items():
            assert stream.completion().token_ids == theirs.answer(messages[name], 8), name


def test_the_same_frames_at_another_rate_are_another_prompt(checkpoint: Path) -> None:
    """Equal pixels, other positions: nothing of the first answer's cache may be taken over."""
    slow, fast = (encoded(numbered(8), fps=rate) for rate in (2, 4))
    chats = [
        [{"role": "user", "content": [{"type": "video", "video": video, "nframes": 8}, {"type": "text", "text": "?"}]}]
        for video in (slow, fast)
    ]
    answers = []
    for order in (chats, chats[::-1]):
        with Engine(checkpoint, dtype="float32", sequence_length=2048) as engine:
            answers.append([engine.chat(chat, GREEDY).logprobs for chat in order])
    assert answers[0] == answers[1][::-1]
