"""Nodes are killed while the arguments of a call are streamed: they stay those of an undisturbed run, and valid."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import jsonschema
import pytest

from mdi import Engine
from tests.gateway.conftest import RealServer, serving

pytestmark = pytest.mark.slow

KILLS = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "stops": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 30}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
            "minItems": 6,
            "maxItems": 6,
        }
    },
    "required": ["stops"],
    "additionalProperties": False,
}
ASK: dict[str, Any] = {
    "model": "bundled",
    "messages": [{"role": "user", "content": "Plan a tour of the red circle and the blue square."}],
    "tools": [{"type": "function", "function": {"name": "plan", "parameters": SCHEMA}}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 1200,
}
GREEDY: dict[str, Any] = {"temperature": 0}
WARM: dict[str, Any] = {"temperature": 1.0, "seed": 11}


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    settings: dict[str, Any] = {"sequence_length": 2048, "max_sequences": 4, "max_losses": 10**6}  # of kills
    with Engine("bundled", n_nodes=3, **settings) as engine, serving(engine) as server:
        yield server


def arguments(server: RealServer, sampling: dict[str, Any], reached: Event | None = None) -> str:
    """The arguments of the call, as they are streamed. reached: set in the middle of them."""
    text = ""
    stream = server.client.chat.completions.create(**ASK, **sampling, stream=True)
    reasons = []
    for chunk in stream:
        reasons.append(chunk.choices[0].finish_reason)
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function
            text += call.function.arguments or ""
        if reached and len(text) >= 60:
            reached.set()
    assert reasons[-1] == "tool_calls"
    return text


def test_streamed_arguments_survive_the_death_of_nodes(server: RealServer) -> None:
    """Greedy and sampled, both at once; the finisher and a secondary are killed in turns."""
    asked = [GREEDY, WARM]
    expected = [arguments(server, sampling) for sampling in asked]
    for text in expected:
        jsonschema.validate(json.loads(text), SCHEMA)
    for number in range(KILLS):
        recoveries, reached = server.engine.recovery.recoveries, [Event() for _ in asked]
        with ThreadPoolExecutor(len(asked)) as pool:
            running = [
                pool.submit(arguments, server, sampling, event) for sampling, event in zip(asked, reached, strict=True)
            ]
            assert all(event.wait(60) for event in reached)
            os.kill(server.engine.nodes()[2 - number % 2].pid, signal.SIGKILL)
            answers = [answer.result() for answer in running]
        assert server.engine.recovery.recoveries > recoveries
        assert answers == expected
