"""langchain-openai: chats, streams, images, bound tools, structured output, the Responses API."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, SecretStr

MODEL = "bundled"


class Seen(BaseModel):
    """What a picture shows."""

    shape: Literal["circle", "star"]
    many: bool


@tool
def get_weather(city: Literal["Paris", "Oslo"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


@pytest.fixture(scope="module")
def chat(base_url: str, key: str) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=base_url, api_key=SecretStr(key), temperature=0, max_retries=0)


@pytest.fixture(scope="module")
def question(star_url: str) -> list[Any]:
    picture = {"type": "image_url", "image_url": {"url": star_url}}
    text = {"type": "text", "text": "Tell me the shape of the purple shape."}
    return [HumanMessage(content=[picture, text])]


def test_a_chat_sees_a_picture_whole_and_streamed(chat: ChatOpenAI, question: list[Any]) -> None:
    whole = chat.invoke(question)
    assert isinstance(whole, AIMessage)
    assert "star" in whole.content
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0
    streamed = list(chat.stream(question, stream_usage=True))
    together = sum(streamed[1:], streamed[0])
    assert together.content == whole.content
    assert together.usage_metadata is not None
    assert together.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]


def test_a_picture_as_langchains_own_block(chat: ChatOpenAI, star: str) -> None:
    picture = {"type": "image", "base64": star, "mime_type": "image/png"}
    text = {"type": "text", "text": "Tell me the shape of the purple shape."}
    assert "star" in chat.invoke([HumanMessage(content=[picture, text])]).content


def test_bound_tools_are_called_and_answered(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    messages: list[Any] = [SystemMessage("You call tools."), HumanMessage("What is the weather in Oslo?")]
    called = bound.invoke(messages)
    assert isinstance(called, AIMessage)
    assert not called.invalid_tool_calls
    [call] = called.tool_calls
    assert call["name"] == "get_weather"
    streamed = list(bound.stream(messages))
    together = sum(streamed[1:], streamed[0])
    assert isinstance(together, AIMessageChunk)
    assert [found["args"] for found in together.tool_calls] == [call["args"]]
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    last = chat.bind_tools([get_weather], tool_choice="none").invoke([*messages, called, result], max_tokens=8)
    assert isinstance(last, AIMessage)
    assert last.tool_calls == []


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, question: list[Any], method: Any) -> None:
    answer = chat.with_structured_output(Seen, method=method, include_raw=True).invoke(question)
    assert isinstance(answer, dict)
    assert answer["parsing_error"] is None
    assert isinstance(answer["parsed"], Seen)


def test_structured_output_is_streamed(chat: ChatOpenAI, question: list[Any]) -> None:
    answers = list(chat.with_structured_output(Seen, method="json_schema").stream(question))
    assert isinstance(answers[-1], Seen)


def test_the_responses_api(base_url: str, key: str, question: list[Any]) -> None:
    chat = ChatOpenAI(
        model=MODEL, base_url=base_url, api_key=SecretStr(key), temperature=0, max_retries=0, use_responses_api=True
    )
    whole = chat.invoke(question)
    assert "star" in str(whole.text)
    streamed = list(chat.stream(question))
    assert str(sum(streamed[1:], streamed[0]).text) == str(whole.text)
    called = chat.bind_tools([get_weather], tool_choice="required").invoke("What is the weather in Oslo?")
    assert isinstance(called, AIMessage)
    assert called.tool_calls[0]["name"] == "get_weather"
    assert isinstance(chat.with_structured_output(Seen, method="json_schema").invoke(question), Seen)


def test_completions(base_url: str, key: str) -> None:
    model = OpenAI(model=MODEL, base_url=base_url, api_key=SecretStr(key), temperature=0, max_tokens=4, max_retries=0)
    assert model.invoke("The shape is a") == "".join(model.stream("The shape is a"))
