"""Tools on /v1/chat/completions, with the official client, in front of a scripted engine."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

import openai
import pytest
from testing.fakes import piece

from tests.gateway.conftest import CHAT, HELLO, FakeServer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]
TEXTS = (
    "I look.\n<tool_call>",
    '\n{"name": "weather", ',
    '"arguments": {"ci',
    'ty": "Oslo"}}\n</tool_call>\n<tool_ca',
    'll>\n{"name": "clock", "arguments": {}}\n</tool_call>',
)


def say_calls(server: FakeServer, n: int = 1) -> None:
    """Every sample looks, and calls two tools."""
    steps = [piece(text, "stop" if text == TEXTS[-1] else None, index=index) for text in TEXTS for index in range(n)]
    server.engine.says(*steps)


def test_the_client_gets_calls_whole(open_server: FakeServer, client: openai.OpenAI) -> None:
    say_calls(open_server)
    choice = client.chat.completions.create(model="fake", messages=HELLO, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    functions = [call.function for call in choice.message.tool_calls or () if call.type == "function"]
    assert [(function.name, function.arguments) for function in functions] == [
        ("weather", '{"city": "Oslo"}'),
        ("clock", "{}"),
    ]


def test_the_client_gets_calls_in_pieces(open_server: FakeServer, client: openai.OpenAI) -> None:
    say_calls(open_server, n=2)
    stream = client.chat.completions.create(model="fake", messages=HELLO, tools=TOOLS, n=2, stream=True)
    contents: dict[int, str] = defaultdict(str)
    arguments: dict[tuple[int, int], str] = defaultdict(str)
    names, ids, reasons = [], set(), []
    for chunk in stream:
        choice = chunk.choices[0]
        contents[choice.index] += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or ():
            assert call.function
            if call.function.name:
                assert call.type == "function"
                names.append((choice.index, call.index, call.function.name))
                ids.add(call.id)
            arguments[choice.index, call.index] += call.function.arguments or ""
    assert contents == {0: "I look.", 1: "I look."}
    assert sorted(names) == [(0, 0, "weather"), (0, 1, "clock"), (1, 0, "weather"), (1, 1, "clock")]
    assert arguments == {
        (index, call): text for index in (0, 1) for call, text in enumerate(('{"city": "Oslo"}', "{}"))
    }
    assert len(ids) == 4
    assert reasons == ["tool_calls", "tool_calls"]


def test_deltas_have_no_nulls(open_server: FakeServer) -> None:
    say_calls(open_server)
    *chunks, done = open_server.events("/v1/chat/completions", **CHAT, tools=TOOLS)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "null" not in json.dumps(deltas)
    assert [list(delta) for delta in deltas[:2]] == [["role", "content"], ["content"]]
    assert deltas[-1] == {}


def test_without_text_the_content_is_null(server: FakeServer) -> None:
    server.engine.says(piece('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>', "stop"))
    message = server.post("/v1/chat/completions", json={**CHAT, "tools": TOOLS}).json()["choices"][0]["message"]
    assert message["content"] is None
    assert "reasoning_content" not in message


def test_a_call_that_is_cut_off_says_length(server: FakeServer) -> None:
    server.engine.says(piece('<tool_call>\n{"name": "clock", "arguments": {"a'), piece("", "length"))
    choice = server.post("/v1/chat/completions", json={**CHAT, "tools": TOOLS}).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "clock", "arguments": '{"a'}


def test_logprobs_have_every_token_once(server: FakeServer) -> None:
    say_calls(server)
    body = {**CHAT, "tools": TOOLS, "logprobs": True}
    chunks = server.events("/v1/chat/completions", **body)[:-1]
    shown = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert len(shown) == len(TEXTS)


def test_calls_of_the_older_form(open_server: FakeServer, client: openai.OpenAI) -> None:
    open_server.engine.says(piece('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>', "stop"))
    functions = [tool["function"] for tool in TOOLS]
    choice = client.chat.completions.create(model="fake", messages=HELLO, functions=functions).choices[0]
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call
    assert (choice.message.function_call.name, choice.message.function_call.arguments) == ("clock", "{}")
    stream = client.chat.completions.create(model="fake", messages=HELLO, functions=functions, stream=True)
    calls = [chunk.choices[0].delta.function_call for chunk in stream if chunk.choices[0].delta.function_call]
    assert [(call.name, call.arguments) for call in calls] == [("clock", ""), (None, "{}")]


@pytest.mark.parametrize("choice", ["none", None])
def test_what_looks_like_a_call_is_text_where_none_is_asked_for(server: FakeServer, choice: str | None) -> None:
    text = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    server.engine.says(piece(text, "stop"))
    body = {**CHAT, "tools": TOOLS, "tool_choice": choice} if choice else CHAT
    answer = server.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == (text, "stop")
    conversation = server.engine.calls[-1].conversation
    assert conversation
    assert conversation.tools == ()


def test_only_allowed_tools_are_called_and_all_are_described(server: FakeServer) -> None:
    named = {"type": "function", "function": {"name": "clock"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "x"}}\n</tool_call>'
    server.engine.says(piece(text, "stop"))
    answer = server.post("/v1/chat/completions", json={**CHAT, "tools": TOOLS, "tool_choice": choice}).json()
    assert answer["choices"][0]["message"]["content"] == text
    conversation = server.engine.calls[-1].conversation
    assert conversation
    assert [tool.name for tool in conversation.tools] == ["weather", "clock"]


BAD = [
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"tools": TOOLS, "functions": [{"name": "a"}]}, "functions"),
    ({"functions": 7}, "functions"),
    ({"functions": [{"name": "a"}], "function_call": {"name": "b"}}, "function_call.name"),
    ({"function_call": {"name": "b"}}, "function_call"),
]


@pytest.mark.parametrize(("change", "field"), BAD, ids=lambda value: str(value)[:50])
def test_malformed_tools_are_refused_by_name(server: FakeServer, change: dict[str, Any], field: str) -> None:
    answer = server.post("/v1/chat/completions", json=CHAT | change)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)


def test_unknown_fields_of_tools_are_named_in_the_header(server: FakeServer) -> None:
    tools = [{**TOOLS[1], "cache_control": {"type": "ephemeral"}}]
    answer = server.post("/v1/chat/completions", json={**CHAT, "tools": tools})
    assert answer.status_code == 200
    assert "tools[].cache_control" in answer.headers["x-mdi-ignored"]


def thinking(server: FakeServer, *texts: str, opened: bool = False) -> None:
    """The engine has a model that thinks, and says these texts. opened: the prompt begins the thoughts."""
    server.engine.capabilities = replace(server.engine.capabilities, reasoning=("<think>", "</think>"))
    server.engine.opens_thought = opened
    server.engine.says(*(piece(text, "stop" if text == texts[-1] else None) for text in texts))


@pytest.mark.parametrize("opened", [False, True])
def test_thoughts_are_apart_from_the_answer(open_server: FakeServer, client: openai.OpenAI, opened: bool) -> None:
    first = () if opened else ("<think>\n",)
    thinking(open_server, *first, "He asks.", "\n</think>", "\n\nYes.", opened=opened)
    answer = client.chat.completions.create(model="fake", messages=HELLO)
    message = answer.choices[0].message
    assert message.content == "Yes."
    assert message.model_extra == {"reasoning_content": "He asks.", "reasoning": "He asks."}
    assert answer.usage
    assert answer.usage.completion_tokens_details
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2 + len(first)
    chunks = list(client.chat.completions.create(model="fake", messages=HELLO, stream=True))
    extra = [(chunk.choices[0].delta.model_extra or {}).get("reasoning_content") for chunk in chunks]
    assert [text for text in extra if text] == ["He asks."]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Yes."


def test_tools_are_called_after_thoughts(server: FakeServer) -> None:
    thinking(server, "<think>", "I could <tool_call>", "</think>", *TEXTS)
    body = {**CHAT, "tools": TOOLS, "include_reasoning": False}
    choice = server.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather", "clock"]
    assert choice["message"]["content"] == "I look."
    assert "reasoning" not in choice["message"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
    ],
)
def test_the_wish_to_think_reaches_the_template(server: FakeServer, given: Any, expected: Any) -> None:
    assert server.post("/v1/chat/completions", json=CHAT | given).status_code == 200
    assert server.engine.calls[-1].settings == expected


def test_marks_that_are_special_tokens_are_asked_for(server: FakeServer) -> None:
    """The text has them for the parser, and only where calls or thoughts are looked for."""
    server.engine.capabilities = replace(
        server.engine.capabilities, tool_syntax="mistral", special_marks={"[TOOL_CALLS]": 5}
    )
    asked = []
    for body in (CHAT, {**CHAT, "tools": TOOLS}, {**CHAT, "tools": TOOLS, "tool_choice": "none"}):
        assert server.post("/v1/chat/completions", json=body).status_code == 200
        call = server.engine.calls[-1]
        assert call.conversation
        asked.append((call.conversation.marks, call.constraint and call.constraint.begins))
    assert asked == [((), None), (("[TOOL_CALLS]",), ("[TOOL_CALLS]",)), ((), None)]
    constraint = server.engine.calls[1].constraint
    assert constraint
    assert "<[5]>" in constraint.grammar


def test_a_stop_string_within_a_call_ends_the_answer_and_the_call_is_not_whole(server: FakeServer) -> None:
    server.engine.says(piece('<tool_call>\n{"name": "clock", "arguments": {"a": '), piece("", "stop"))
    choice = server.post("/v1/chat/completions", json={**CHAT, "tools": TOOLS, "stop": "x"}).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": '
