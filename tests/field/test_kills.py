"""Nodes are killed under the bundled model, in the dtype that ships: tokens and logprobs stay those of a calm run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from mdi import Engine, SamplingParams
from mdi.core.batch import Token

pytestmark = pytest.mark.slow

STORY = "Tell me about the red circle and the blue square, and what stands left of them. "
GREEDY = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, top_logprobs=3)
WARM = SamplingParams(temperature=1.0, seed=7, max_tokens=300, ignore_eos=True, top_logprobs=3)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("bundled", n_nodes=3, sequence_length=1024, max_sequences=6) as engine:
        assert {node.dtype for node in engine.nodes()} == {"bfloat16"}
        yield engine


def about(image: bytes) -> Any:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": STORY}]}]


def tokens(engine: Engine, prompt: Any, params: SamplingParams, reached: Event | None = None) -> list[Token]:
    """The tokens of an answer with their logprobs. reached: set when there are 20 of them."""
    drawn: list[Token] = []
    for piece in engine.submit(prompt, params):
        drawn += piece.tokens
        if reached and len(drawn) >= 20:
            reached.set()
    return drawn


def test_streams_go_on_with_the_tokens_they_would_have_had(engine: Engine, photograph: bytes) -> None:
    """A11: greedy and at temperature 1, several at once, with an image; the finisher is killed, then a secondary.

    The runs before it are undisturbed; each of the later ones takes over a prefix of other length.
    """
    asked = [(STORY, GREEDY), (STORY, WARM), (STORY * 9, WARM), (about(photograph), WARM)]
    expected = [tokens(engine, *request) for request in asked]
    assert all(len(answer) == 300 for answer in expected)
    assert [tokens(engine, *request) for request in asked[:2]] == expected[:2]
    for victim in (2, 1):
        recoveries, reached = engine.recovery.recoveries, [Event() for _ in asked]
        with ThreadPoolExecutor(len(asked)) as pool:
            running = [
                pool.submit(tokens, engine, *request, event) for request, event in zip(asked, reached, strict=True)
            ]
            assert all(event.wait(60) for event in reached)
            os.kill(engine.nodes()[victim].pid, signal.SIGKILL)
            answers = [answer.result() for answer in running]
        assert engine.recovery.recoveries > recoveries
        assert answers == expected
