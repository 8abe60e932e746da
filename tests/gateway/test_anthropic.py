"""/v1/messages, with Anthropic's official client and with plain HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from testing.fakes import FakeEngine, piece

from mdi.core.config import GatewayConfig
from mdi.core.errors import LinkError, OverloadedError
from mdi.core.messages import ImagePart, Message, TextPart
from mdi.gateway.openai.ignored import HEADER
from tests.gateway.conftest import FakeServer, RealServer, serving

WEATHER: Any = {
    "name": "weather",
    "description": "Weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
HELLO: Any = [{"role": "user", "content": "hi"}]
ASKED: dict[str, Any] = {"model": "fake", "max_tokens": 5, "messages": HELLO}


def official(server: FakeServer | RealServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0)


@pytest.fixture
def claude(open_server: FakeServer) -> Iterator[anthropic.Anthropic]:
    with official(open_server) as client:
        yield client


def test_a_message_is_answered(open_server: FakeServer, claude: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    sampling = {"temperature": 0.5, "top_k": 4, "top_p": 0.75}
    answer = claude.messages.create(**ASKED, system=system, stop_sequences=["END"], extra_body=sampling)
    assert [block.to_dict()["text"] for block in answer.content] == ["ok #0"]
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (7, 2)
    call = open_server.engine.calls[-1]
    assert call.prompt == (Message("system", "Be brief."), Message("user", "hi"))
    assert (call.params.max_tokens, call.params.top_k, call.params.top_p) == (5, 4, 0.75)
    assert (call.params.temperature, call.params.stop) == (0.5, ("END",))


def test_the_stream_has_anthropics_events_in_order(server: FakeServer) -> None:
    events = server.named_events("/v1/messages", **ASKED)
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == 7
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def test_the_client_reads_a_stream(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(**ASKED) as stream:
        assert list(stream.text_stream) == ["ok", " #0"]
        assert stream.get_final_message().usage.output_tokens == 2


def test_the_model_calls_a_tool_and_gets_its_result(open_server: FakeServer, claude: anthropic.Anthropic) -> None:
    open_server.engine.says(piece("Let me see."), piece(CALL[:40]), piece(CALL[40:], "stop"))
    asked = {**ASKED, "tools": [WEATHER]}
    with claude.messages.stream(**asked, tool_choice={"type": "auto", "disable_parallel_tool_use": True}) as stream:
        answer: Any = stream.get_final_message()
    whole: Any = claude.messages.create(**asked)
    assert [block.type for block in whole.content] == [block.type for block in answer.content]
    assert (whole.content[1].input, whole.usage) == (answer.content[1].input, answer.usage)
    text, call = answer.content
    assert (answer.stop_reason, text.type, call.type) == ("tool_use", "text", "tool_use")
    assert (call.name, call.input) == ("weather", {"place": "Rome"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny", "is_error": False}
    follow: Any = [
        *HELLO,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    claude.messages.create(**{**asked, "messages": follow})
    messages: Any = open_server.engine.calls[-1].prompt
    _, assistant, tool, user = messages
    assert (assistant.content, tool.content, user.content) == ("Let me see.", "sunny", "So?")
    assert assistant.details["tool_calls"][0]["id"] == tool.details["tool_call_id"] == call.id


@pytest.mark.parametrize(
    ("choice", "mode"),
    [({"type": "any"}, "required"), ({"type": "none"}, "none"), ({"type": "tool", "name": "weather"}, "required")],
)
def test_choices_of_tools_are_anthropics(
    open_server: FakeServer, claude: anthropic.Anthropic, choice: Any, mode: str
) -> None:
    open_server.engine.says(piece(CALL, "stop"))
    answer = claude.messages.create(**ASKED, tools=[WEATHER], tool_choice=choice)
    assert (answer.stop_reason == "tool_use") == (mode == "required")


def test_ends_have_anthropics_names(open_server: FakeServer, claude: anthropic.Anthropic) -> None:
    open_server.engine.says(piece("a", "length"))
    assert claude.messages.create(**ASKED).stop_reason == "max_tokens"


def test_blocks_become_messages(server: FakeServer, picture: str) -> None:
    media_type, _, data = picture.removeprefix("data:").partition(";base64,")
    image = {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}
    linked = {"type": "image", "source": {"type": "url", "url": "https://x/a.png"}, "x": 1}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [linked]}]},
    ]
    answer = server.post("/v1/messages", json={**ASKED, "messages": messages, "metadata": {"user_id": "u"}})
    assert answer.status_code == 200, answer.text
    assert answer.headers[HEADER] == "messages[].content[].content[].x"
    given: Any = server.engine.calls[-1].prompt
    user, assistant, tool = given
    assert user.content == (ImagePart(picture), TextPart("What is it?"))
    assert assistant.details["reasoning_content"] == "Hm."
    assert assistant.details["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": 1}}
    assert tool.content == (ImagePart("https://x/a.png"),)


def test_an_answer_continues_the_assistants_own_words(open_server: FakeServer, claude: anthropic.Anthropic) -> None:
    claude.messages.create(**{**ASKED, "messages": [*HELLO, {"role": "assistant", "content": "The sky is"}]})
    conversation = open_server.engine.calls[-1].conversation
    assert conversation
    assert (conversation.add_generation_prompt, conversation.continue_final_message) == (False, True)


def test_thoughts_are_blocks_of_their_own() -> None:
    engine = FakeEngine()
    engine.capabilities = engine.capabilities.__class__(1000, reasoning=("<think>", "</think>"))
    with serving(engine) as server, official(server) as client:
        engine.says(piece("<think>Hm."), piece("</think>Yes.", "stop"))
        answer = client.messages.create(**ASKED)
        assert [block.type for block in answer.content] == ["thinking", "text"]
        client.messages.create(**ASKED, thinking={"type": "disabled"})
        assert engine.calls[-1].settings["enable_thinking"] is False


def test_an_answer_may_follow_a_schema(open_server: FakeServer, claude: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    claude.messages.create(**ASKED, output_config=config)
    assert open_server.engine.calls[-1].constraint is not None


def test_errors_have_anthropics_shape(open_server: FakeServer, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(**{**ASKED, "model": "x"})
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    open_server.engine.refuse = lambda _: OverloadedError("full")
    with pytest.raises(anthropic.RateLimitError):
        claude.messages.create(**ASKED)
    open_server.engine.reset()
    open_server.engine.says(piece("a"), LinkError("node finisher was lost"))
    with (
        pytest.raises(anthropic.APIStatusError, match="node finisher was lost"),
        claude.messages.stream(**ASKED) as stream,
    ):
        stream.until_done()


def test_the_key_comes_as_anthropics_clients_send_it() -> None:
    with serving(FakeEngine(), GatewayConfig(api_keys=("mine",))) as server:
        with anthropic.Anthropic(base_url=server.url, api_key="mine", max_retries=0) as client:
            assert client.messages.create(**ASKED).stop_reason == "end_turn"
        with anthropic.Anthropic(base_url=server.url, api_key="theirs", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as refused:
                client.messages.create(**ASKED)
            assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


def block(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "x", "content": "y"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (block(type="document"), "messages[0].content[0]"),
        (block(type="text"), "messages[0].content[0].text"),
        (block(type="tool_use", id="x", name="y", input={}), "messages[0].content[0]"),
        (block(type="image", source={"type": "file", "file_id": "x"}), "messages[0].content[0].source"),
        (block(type="image", source={"type": "base64", "data": "x"}), "messages[0].content[0].source.media_type"),
        (block(type="tool_result", content="x"), "messages[0].content[0].tool_use_id"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": 5}, "stop_sequences"),
        ({"system": 5}, "system"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"tools": [{"name": "x", "input_schema": 5}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": "5"}}, "thinking.budget_tokens"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"effort": "<x>"}}, "output_config.effort"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
    ],
)
def test_malformed_requests_are_named(server: FakeServer, asked: Any, named: str) -> None:
    answer = server.post("/v1/messages", json=ASKED | asked)
    assert answer.status_code == 400
    error = answer.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert named in error["error"]["message"]


def test_tokens_are_counted_as_they_are_used(real: RealServer, picture: str) -> None:
    media_type, _, data = picture.removeprefix("data:").partition(";base64,")
    source: Any = {"type": "base64", "media_type": media_type, "data": data}
    content: Any = [{"type": "image", "source": source}, {"type": "text", "text": "What is it?"}]
    with official(real) as client:
        pictured: Any = [{"role": "user", "content": content}]
        for messages in (HELLO, pictured):
            counted = client.messages.count_tokens(model="tiny", messages=messages, system="Be brief.")
            answer = client.messages.create(model="tiny", messages=messages, system="Be brief.", max_tokens=1)
            assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def test_a_stop_sequence_is_named(real: RealServer) -> None:
    with official(real) as client:
        free = client.messages.create(model="tiny", messages=HELLO, max_tokens=12, extra_body={"temperature": 0})
        text: str = free.content[0].to_dict()["text"]  # type: ignore[assignment]
        stop = text[2:4]
        answer = client.messages.create(
            model="tiny", messages=HELLO, max_tokens=12, stop_sequences=[stop, "never"], extra_body={"temperature": 0}
        )
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
