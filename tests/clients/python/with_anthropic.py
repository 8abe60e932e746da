"""Anthropic's client: messages, streams, images, tools, counted tokens, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

MODEL = "bundled"
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
        "required": ["city"],
    },
}
GREEDY = {"temperature": 0}  # newer clients have no argument for it
HELLO: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def client(base_url: str, key: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=base_url.removesuffix("/v1"), api_key=key, max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def question(star: str) -> list[Any]:
    source = {"type": "base64", "media_type": "image/png", "data": star}
    text = {"type": "text", "text": "Tell me the shape of the purple shape."}
    return [{"role": "user", "content": [{"type": "image", "source": source}, text]}]


def test_a_message_sees_a_picture(client: Anthropic, question: list[Any]) -> None:
    answer = client.messages.create(
        model=MODEL, max_tokens=32, system="Answer briefly.", messages=question, extra_body=GREEDY
    )
    assert answer.stop_reason == "end_turn"
    assert answer.content[0].type == "text"
    assert answer.content[0].text
    assert answer.usage.input_tokens > 0


def test_a_stream_is_the_whole_message(client: Anthropic, question: list[Any]) -> None:
    settings: Any = {"model": MODEL, "max_tokens": 32, "messages": question, "extra_body": GREEDY}
    whole = client.messages.create(**settings)
    with client.messages.stream(**settings) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert "star" in whole.content[0].text
    assert text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in client.messages.create(**settings, stream=True)]
    assert (kinds[0], kinds[-2], kinds[-1]) == ("message_start", "message_delta", "message_stop")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "named"])
def test_tools_are_called_and_answered(client: Anthropic, choice: Any) -> None:
    settings: Any = {"model": MODEL, "max_tokens": 256, "tools": [WEATHER], "extra_body": GREEDY}
    whole = client.messages.create(messages=HELLO, tool_choice=choice | {"disable_parallel_tool_use": True}, **settings)
    assert whole.stop_reason == "tool_use"
    [call] = [block for block in whole.content if block.type == "tool_use"]
    assert call.name == "get_weather"
    assert call.input["city"] in ("Paris", "Oslo")
    with client.messages.stream(
        messages=HELLO, tool_choice=choice | {"disable_parallel_tool_use": True}, **settings
    ) as stream:
        final = stream.get_final_message()
    assert [block.input for block in final.content if block.type == "tool_use"] == [call.input]
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    answered: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(messages=answered, **settings).content is not None


def test_tokens_are_counted(client: Anthropic, question: list[Any]) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=question)
    answer = client.messages.create(model=MODEL, max_tokens=1, messages=question)
    read = answer.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == answer.usage.input_tokens + read
    assert answer.stop_reason == "max_tokens"
    assert client.messages.count_tokens(model=MODEL, messages=question, tools=[WEATHER]).input_tokens > (
        counted.input_tokens
    )


def test_stop_sequences_are_named(client: Anthropic) -> None:
    settings: Any = {"model": MODEL, "max_tokens": 16, "messages": HELLO, "extra_body": GREEDY}
    whole = client.messages.create(**settings).content[0]
    assert whole.type == "text"
    stop = whole.text[1:3]
    answer = client.messages.create(**settings, stop_sequences=[stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)


def test_settings_of_coding_agents_are_accepted(client: Anthropic) -> None:
    cached: Any = {"type": "text", "text": "Answer briefly.", "cache_control": {"type": "ephemeral"}}
    answer = client.messages.create(
        model=MODEL,
        max_tokens=4,
        system=[cached],
        messages=[{"role": "user", "content": [cached]}],
        metadata={"user_id": "anna"},
        thinking={"type": "disabled"},
        extra_headers={"anthropic-beta": "prompt-caching-2024-07-31"},
    )
    assert answer.role == "assistant"


def test_errors_are_the_clients_own(client: Anthropic, base_url: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model=MODEL, max_tokens=-1, messages=HELLO)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude-sonnet", max_tokens=1, messages=HELLO)
    stranger = Anthropic(base_url=base_url.removesuffix("/v1"), api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as unknown:
        stranger.messages.create(model=MODEL, max_tokens=1, messages=HELLO)
    assert unknown.value.body == {
        "type": "error",
        "error": {"type": "authentication_error", "message": unknown.value.body["error"]["message"]},  # type: ignore[index]
    }


def test_models_are_listed(client: Anthropic) -> None:
    assert MODEL in [model.id for model in client.models.list()]
