"""OpenAI's own client: chats, streams, schemas, tools, images, completions, responses, models, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

MODEL = "bundled"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Oslo"]},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


class Shape(StrEnum):
    CIRCLE = "circle"
    STAR = "star"


class Seen(BaseModel):
    shape: Shape
    count: bool


@pytest.fixture(scope="module")
def client(base_url: str, key: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key=key, max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def question(star_url: str) -> list[Any]:
    """What shape is in a picture of a star."""
    picture = {"type": "image_url", "image_url": {"url": star_url, "detail": "auto"}}
    text = {"type": "text", "text": "Tell me the shape of the purple shape."}
    return [{"role": "user", "content": [picture, text]}]


def test_a_chat_sees_a_picture(client: OpenAI, question: list[Any]) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=question, temperature=0, max_completion_tokens=16)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content is not None
    assert "star" in choice.message.content
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert choice.message.refusal is None
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id


def test_a_stream_is_the_whole_answer(client: OpenAI, question: list[Any]) -> None:
    settings: Any = {"model": MODEL, "messages": question, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    *with_choices, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in with_choices) == whole.choices[0].message.content
    assert with_choices[0].choices[0].delta.role == "assistant"
    assert with_choices[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_helper_for_streams_collects_the_answer(client: OpenAI, question: list[Any]) -> None:
    with client.chat.completions.stream(model=MODEL, messages=question, temperature=0, max_tokens=16) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds[-1] == "content.done"
    assert "star" in (final.choices[0].message.content or "")


def test_the_asynchronous_client_streams(base_url: str, key: str, question: list[Any]) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
            stream = await client.chat.completions.create(model=MODEL, messages=question, temperature=0, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert "star" in asyncio.run(ask())


def test_answers_are_parsed_into_models(client: OpenAI, question: list[Any]) -> None:
    parsed = client.chat.completions.parse(model=MODEL, messages=question, response_format=Seen, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Seen)
    with client.chat.completions.stream(model=MODEL, messages=question, response_format=Seen, temperature=0) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert streamed.choices[0].message.parsed == parsed.choices[0].message.parsed


def test_an_answer_that_is_cut_off_is_named_by_the_parser(client: OpenAI, question: list[Any]) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=question, response_format=Seen, max_tokens=2)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_tools_are_called_whole_and_streamed(client: OpenAI, choice: Any) -> None:
    settings: Any = {
        "model": MODEL,
        "messages": [
            {"role": "developer", "content": "You call tools."},
            {"role": "user", "content": "What is the weather in Oslo?"},
        ],
        "tools": [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**settings)
    assert whole.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")
    message = whole.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function"
    assert call.id
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Oslo")

    chunks = list(client.chat.completions.create(**settings, stream=True))
    deltas = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    assert [part.index for part in deltas] == [0] * len(deltas)
    assert [part.id for part in deltas if part.id] == [deltas[0].id]
    assert [part.function.name for part in deltas if part.function and part.function.name] == ["get_weather"]
    text = "".join(part.function.arguments or "" for part in deltas if part.function)
    assert json.loads(text) == arguments


def test_tools_of_pydantic_models_are_parsed(client: OpenAI) -> None:
    class Count(BaseModel):
        """How many shapes there are."""

        shape: Shape

    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "How many stars are there?"}],
        tools=[openai.pydantic_function_tool(Count)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
    )
    calls = parsed.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, Count)


def test_results_of_tools_are_sent_back(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    called = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    calls = called.choices[0].message.tool_calls
    assert calls
    messages.append(called.choices[0].message)  # the object itself, as OpenAI's guide does
    messages.append({"role": "tool", "tool_call_id": calls[0].id, "content": [{"type": "text", "text": "rain"}]})
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=8
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content


def test_fields_that_agents_send_are_accepted(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello", "name": "anna"}],
        max_completion_tokens=4,
        store=False,
        metadata={"run": "1"},
        reasoning_effort="low",
        service_tier="auto",
        user="anna",
        safety_identifier="anna",
        seed=1,
        logit_bias={},
        response_format={"type": "text"},
        extra_body={"foreign_setting": 1},
    )
    assert raw.headers["x-request-id"] == raw.request_id
    assert raw.headers["x-mdi-ignored"] == "foreign_setting"
    answer = raw.parse()
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_several_answers_with_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Which colors are there?"}],
        n=2,
        seed=3,
        logprobs=True,
        top_logprobs=2,
        max_tokens=4,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_completions_continue_texts_and_token_ids(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["The shape is a", "The color is"], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    settings: Any = {"model": MODEL, "prompt": [84, 104, 101], "max_tokens": 4, "temperature": 0}
    whole = client.completions.create(**settings)
    streamed = client.completions.create(**settings, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_completions_end_where_harnesses_say(client: OpenAI) -> None:
    """The request of lm-eval's local-completions: prompts in a batch, several ends, a seed."""
    prompts = ["Q: Is there a star?\nA:", "Q: Is there a circle?\nA:"]
    settings: Any = {"model": MODEL, "prompt": prompts, "max_tokens": 8, "temperature": 0, "seed": 1234}
    whole = client.completions.create(**settings, logprobs=1)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert all(choice.logprobs and choice.logprobs.token_logprobs for choice in whole.choices)
    end = whole.choices[0].text[1:2]
    ended = client.completions.create(**settings, stop=[end, "\n\n"])
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == (whole.choices[0].text[:1], "stop")


def test_texts_are_scored(client: OpenAI) -> None:
    """The request by which lm-eval's local-completions judges answers: the logprobs of the prompt."""
    scored = client.completions.create(
        model=MODEL, prompt="The shape is a star", max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    logprobs = scored.choices[0].logprobs
    assert logprobs
    assert logprobs.tokens
    scores: Any = logprobs.token_logprobs  # the first one is null, which the client's types leave out
    assert len(scores) == len(logprobs.tokens) == len(logprobs.text_offset or ())
    assert scores[0] is None
    assert all(score <= 0 for score in scores[1:])


def test_responses_whole_and_streamed(client: OpenAI, star_url: str) -> None:
    asked: Any = [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": star_url, "detail": "auto"},
                {"type": "input_text", "text": "Tell me the shape of the purple shape."},
            ],
        }
    ]
    whole = client.responses.create(model=MODEL, input=asked, temperature=0, max_output_tokens=32)
    assert whole.status == "completed"
    assert "star" in whole.output_text
    events = list(client.responses.create(model=MODEL, input=asked, temperature=0, max_output_tokens=32, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text

    next_one = client.responses.create(
        model=MODEL, input="And the color?", previous_response_id=whole.id, max_output_tokens=8
    )
    assert next_one.previous_response_id == whole.id
    assert next_one.usage is not None
    assert whole.usage is not None
    assert next_one.usage.input_tokens > whole.usage.input_tokens


def test_responses_are_parsed_and_collected(client: OpenAI) -> None:
    parsed = client.responses.parse(model=MODEL, input="Is there a star?", text_format=Seen, temperature=0)
    assert isinstance(parsed.output_parsed, Seen)
    with client.responses.stream(model=MODEL, input="Is there a star?", text_format=Seen, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_responses_call_tools_and_take_their_results(client: OpenAI) -> None:
    tool: Any = {"type": "function", **WEATHER["function"]}
    asked: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    settings: Any = {"model": MODEL, "tools": [tool], "temperature": 0, "parallel_tool_calls": False}
    called = client.responses.create(input=asked, tool_choice="required", **settings)
    calls = [item for item in called.output if item.type == "function_call"]
    assert calls[0].name == "get_weather"
    assert json.loads(calls[0].arguments)["unit"] in ("C", "F")
    events = list(client.responses.create(input=asked, tool_choice="required", stream=True, **settings))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done[0].arguments == calls[0].arguments
    asked += called.output
    asked.append({"type": "function_call_output", "call_id": calls[0].call_id, "output": "rain"})
    answer = client.responses.create(input=asked, tool_choice="none", max_output_tokens=8, **settings)
    assert answer.output_text


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_errors_are_the_clients_own(client: OpenAI, base_url: str) -> None:
    hello: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=hello, temperature=-1)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=hello, tools=[NAMED | {"function": {"name": "a b"}}])
    assert "tools" in (bad.value.param or "")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=hello)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as unknown:
        OpenAI(base_url=base_url, api_key="wrong", max_retries=0).models.list()
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError) as none:
        client.embeddings.create(model=MODEL, input="Hello")
    assert "embeddings" in none.value.message


def test_requests_beyond_a_limit_say_when_to_try_again(base_url: str, limited_key: str) -> None:
    client = OpenAI(base_url=base_url, api_key=limited_key, max_retries=0)
    settings: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    client.chat.completions.create(**settings)
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(**settings)
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
