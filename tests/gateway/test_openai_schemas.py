"""Which fields OpenAI's routes accept, ignore and refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mdi.core.sampling import SamplingParams
from tests.gateway.conftest import CHAT, FakeServer


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": False},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False},
        {"stream": None, "stop": None, "n": None, "max_tokens": None, "stream_options": None},
        {"logit_bias": None, "presence_penalty": None, "min_tokens": None, "logprobs": None, "top_logprobs": None},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(server: FakeServer, fields: dict[str, Any]) -> None:
    assert server.post("/v1/chat/completions", json={**CHAT, **fields}).status_code == 200


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("chat/completions", "tool_choice", "required"),
        ("completions", "tools", [{"type": "function", "function": {"name": "f"}}]),
        ("completions", "function_call", {"name": "f"}),
        ("chat/completions", "response_format", "json_object"),
        ("chat/completions", "top_logprobs", 2),
        ("chat/completions", "modalities", ["text", "audio"]),
        ("chat/completions", "logit_bias", {"5": 101}),
        ("chat/completions", "frequency_penalty", 2.5),
        ("chat/completions", "repetition_penalty", 0),
        ("chat/completions", "min_tokens", -1),
        ("chat/completions", "stop_token_ids", [-1]),
        ("chat/completions", "max_completion_tokens", -2),
        ("chat/completions", "stop", 5),
        ("chat/completions", "echo", True),
        ("completions", "suffix", "x"),
        ("completions", "best_of", 3),
        ("completions", "logprobs", 21),
        ("completions", "prompt", []),
        ("completions", "prompt", {"a": 1}),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(
    server: FakeServer, path: str, field: str, value: Any
) -> None:
    valid = CHAT if path == "chat/completions" else {"model": "fake", "prompt": "x"}
    answer = server.post(f"/v1/{path}", json={**valid, field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert field in answer.json()["error"]["message"]
    assert server.engine.calls == []


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_temperature_that_is_no_number_is_refused_by_name(server: FakeServer, value: str) -> None:
    body = json.dumps(CHAT)[:-1] + f', "temperature": {value}}}'
    answer = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temperature"


def test_the_newer_name_of_max_tokens_overrides_the_older(server: FakeServer) -> None:
    for limits, expected in (
        ({"max_tokens": 3, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 3, "max_completion_tokens": None}, 3),
        ({"max_completion_tokens": 5}, 5),
    ):
        assert server.post("/v1/chat/completions", json={**CHAT, **limits}).status_code == 200
        assert server.engine.calls[-1].params.max_tokens == expected


@pytest.mark.parametrize(("given", "tokens", "reported"), [({}, 16, False), ({"logprobs": 0}, 16, True)])
def test_completions_have_defaults_of_their_own(server: FakeServer, given: Any, tokens: int, reported: bool) -> None:
    answer = server.post("/v1/completions", json={"model": "fake", "prompt": "x", **given}).json()
    assert server.engine.calls[-1].params.max_tokens == tokens
    assert (answer["choices"][0]["logprobs"] is not None) == reported
    server.post("/v1/completions", json={"model": "fake", "prompt": "x", "max_tokens": None, "logprobs": None})
    assert server.engine.calls[-1].params == SamplingParams(max_tokens=16)
