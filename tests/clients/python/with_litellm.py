"""litellm: completion whole and streamed, images, tools, schemas, its own exceptions; as OpenAI's and as vLLM's."""

from __future__ import annotations

import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
            "required": ["city"],
        },
    },
}


class Seen(BaseModel):
    shape: Literal["circle", "star"]


@pytest.fixture(params=["openai/bundled", "hosted_vllm/bundled"])
def server(request: pytest.FixtureRequest, base_url: str, key: str) -> dict[str, Any]:
    return {"model": request.param, "api_base": base_url, "api_key": key, "num_retries": 0}


@pytest.fixture(scope="module")
def question(star_url: str) -> list[Any]:
    picture = {"type": "image_url", "image_url": {"url": star_url}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": "Tell me the shape of the purple shape."}]}]


def test_a_chat_sees_a_picture_whole_and_streamed(server: dict[str, Any], question: list[Any]) -> None:
    whole: Any = litellm.completion(messages=question, temperature=0, **server)
    assert "star" in whole.choices[0].message.content
    chunks: Any = list(
        litellm.completion(
            messages=question, temperature=0, stream=True, stream_options={"include_usage": True}, **server
        )
    )
    built: Any = litellm.stream_chunk_builder(chunks, messages=question)
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.choices[0].finish_reason == "stop"
    assert built.usage.completion_tokens == whole.usage.completion_tokens


def test_tools_are_called_whole_and_streamed(server: dict[str, Any]) -> None:
    settings: Any = {
        "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
    }
    whole: Any = litellm.completion(**settings, **server)
    assert whole.choices[0].finish_reason == "tool_calls"
    [call] = whole.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    chunks: Any = list(litellm.completion(**settings, stream=True, **server))
    built: Any = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].finish_reason == "tool_calls"
    assert built.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


def test_answers_follow_a_model(server: dict[str, Any], question: list[Any]) -> None:
    answer: Any = litellm.completion(messages=question, response_format=Seen, temperature=0, **server)
    Seen.model_validate_json(answer.choices[0].message.content)


def test_errors_are_litellms_own(server: dict[str, Any]) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    with pytest.raises(litellm.exceptions.BadRequestError, match="temperature"):
        litellm.completion(messages=hello, temperature=-1, **server)
    with pytest.raises(litellm.exceptions.NotFoundError):
        litellm.completion(messages=hello, **server | {"model": server["model"].replace("bundled", "other")})
    with pytest.raises(litellm.exceptions.AuthenticationError):
        litellm.completion(messages=hello, **server | {"api_key": "wrong"})


def test_messages_of_anthropic(base_url: str, key: str) -> None:
    answer: Any = litellm.completion(
        model="anthropic/bundled",
        api_base=base_url.removesuffix("/v1"),
        api_key=key,
        messages=[{"role": "user", "content": "Which colors are there?"}],
        max_tokens=8,
    )
    assert answer.choices[0].message.content
