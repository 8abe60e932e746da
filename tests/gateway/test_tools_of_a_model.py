"""Tools with a real engine in front of a tiny random model: what it calls is valid, whole and streamed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mdi import Engine
from tests.gateway.conftest import RealServer, serving

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]
SCHEMAS: dict[str, dict[str, Any]] = {"weather": SCHEMA, "clock": {"type": "object", "maxProperties": 0}}
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}


@pytest.fixture(scope="module")
def roomy(tiny_checkpoint: Path) -> Iterator[RealServer]:
    """Serves a tiny model with room for tools in the prompt."""
    with Engine(tiny_checkpoint, sequence_length=2048, max_sequences=8) as engine, serving(engine) as server:
        yield server


def calls_of(server: RealServer, **body: Any) -> tuple[list[list[tuple[str, str]]], list[str], list[str]]:
    """The calls of each choice, their contents and the reasons of their ends; the stream has the same."""
    answer = server.post("/v1/chat/completions", json=ASK | body)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    whole = [
        [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"].get("tool_calls", ())]
        for choice in choices
    ]
    streamed: dict[int, list[list[str]]] = defaultdict(list)
    for chunk in server.events("/v1/chat/completions", **ASK, **body)[:-1]:
        choice = chunk["choices"][0]
        for call in choice["delta"].get("tool_calls", ()):
            made = streamed[choice["index"]]
            made += [[call["function"]["name"], ""]] if "id" in call else []
            made[call["index"]][1] += call["function"]["arguments"]
    assert [list(map(tuple, streamed[index])) for index in range(len(choices))] == whole
    contents = [choice["message"]["content"] for choice in choices]
    return whole, contents, [choice["finish_reason"] for choice in choices]


@pytest.mark.parametrize(("temperature", "parallel"), [(0.0, False), (1.0, True)])
def test_required_calls_fit_their_schemas(roomy: RealServer, temperature: float, parallel: bool) -> None:
    body = {"tool_choice": "required", "parallel_tool_calls": parallel, "max_tokens": 150, "seed": 3}
    calls, contents, reasons = calls_of(roomy, **body, temperature=temperature, n=2)
    for made, content, reason in zip(calls, contents, reasons, strict=True):
        assert made
        assert not content
        assert len(made) == 1 or parallel
        for name, arguments in made if reason == "tool_calls" else made[:-1]:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert parallel or reasons == ["tool_calls"] * 2


def test_a_named_call_ends_with_stop(roomy: RealServer) -> None:
    named = {"type": "function", "function": {"name": "clock"}}
    calls, _, reasons = calls_of(roomy, tool_choice=named, temperature=1.0, seed=1, max_tokens=100)
    assert reasons == ["stop"]
    for made in calls:
        assert [name for name, _ in made] == ["clock"]
        assert json.loads(made[0][1]) == {}


@pytest.mark.parametrize(("max_tokens", "n_calls"), [(3, 0), (50, 1)])
def test_a_call_that_is_cut_off_says_length(roomy: RealServer, max_tokens: int, n_calls: int) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    (made,), _, reasons = calls_of(roomy, tool_choice=named, temperature=1.0, seed=1, max_tokens=max_tokens)
    assert reasons == ["length"]
    assert len(made) == n_calls


def test_none_calls_nothing_and_describes_nothing(roomy: RealServer) -> None:
    """The answer is that of a request without tools."""
    body = {"temperature": 0, "max_tokens": 12}
    calls, contents, _ = calls_of(roomy, **body, tool_choice="none")
    plain = roomy.post("/v1/chat/completions", json={**ASK, "tools": [], **body}).json()
    assert calls == [[]]
    assert contents == [plain["choices"][0]["message"]["content"]]


def test_an_answer_with_a_schema_fits_it_or_calls(roomy: RealServer) -> None:
    content = {
        "type": "object",
        "properties": {"x": {"enum": [1, 2]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": content}}
    body = {"response_format": response_format, "temperature": 1.0, "max_tokens": 150}
    calls, contents, reasons = calls_of(roomy, **body, seed=2, n=4, parallel_tool_calls=False)
    for made, text, reason in zip(calls, contents, reasons, strict=True):
        if made and reason == "tool_calls":
            jsonschema.validate(json.loads(made[0][1]), SCHEMAS[made[0][0]])
        elif reason == "stop":
            jsonschema.validate(json.loads(text), content)
    assert "stop" in reasons or "tool_calls" in reasons


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"type": "object", "properties": {"a": {"type": "colour"}}}, "tools[1].function.parameters"),
        ({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}, "tools[1].function.parameters"),
        ({"type": "object", "properties": {"a": {"pattern": "("}}}, "tools[1].function.parameters"),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "required": 7}, "tools[1].function.parameters"),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("stream", [False, True])
def test_schemas_that_are_not_supported_are_refused_by_name(
    roomy: RealServer, stream: bool, schema: Any, field: str
) -> None:
    tools = [TOOLS[1], {"type": "function", "function": {"name": "bad", "parameters": schema}}]
    answer = roomy.post("/v1/chat/completions", json={**ASK, "tools": tools, "stream": stream})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_a_picture_in_the_result_of_a_tool_is_read(roomy: RealServer, picture: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    parts = [{"type": "text", "text": "as seen:"}, {"type": "image_url", "image_url": {"url": picture}}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "How late is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": parts},
    ]
    counts = []
    for content in (parts, parts[:1]):
        messages[2]["content"] = content
        answer = roomy.post("/v1/chat/completions", json={**ASK, "messages": messages, "max_tokens": 1})
        assert answer.status_code == 200, answer.text
        counts.append(answer.json()["usage"]["prompt_tokens"])
    assert counts[0] > counts[1] + 10
