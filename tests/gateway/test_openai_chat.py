"""/v1/chat/completions, with the official client and with plain HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from mdi.core.messages import ImagePart, Message, TextPart, VideoPart
from mdi.core.sampling import SamplingParams
from mdi.gateway.openai.ignored import HEADER
from tests.gateway.conftest import CHAT, HELLO, REAL_KEY, FakeServer, RealServer, data_url, video_chat


def test_every_setting_of_the_openai_client_reaches_the_engine(open_server: FakeServer, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="fake",
        messages=HELLO,
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.75,
        seed=3,
        stop="END",
        n=2,
        extra_body={"top_k": 4, "min_p": 0.25, "min_pixels": 100, "max_pixels": 200},
    )
    call = open_server.engine.calls[0]
    assert call.params == SamplingParams(
        max_tokens=5, temperature=0.5, top_p=0.75, top_k=4, min_p=0.25, seed=3, stop="END", n=2
    )
    assert (call.min_pixels, call.max_pixels) == (100, 200)


def test_messages_reach_the_engine_typed(server: FakeServer) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": "Hi", "name": "it", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]},
    ]
    assert server.post("/v1/chat/completions", json={**CHAT, "messages": messages}).status_code == 200
    assert server.engine.calls[0].prompt == (
        Message("system", "Be brief."),
        Message("assistant", "Hi", {"name": "it"}),
        Message("user", (ImagePart("data:image/png;base64,AAAA"), TextPart("What?"))),
    )


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function"),
        ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, "messages[0].audio"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].image_url"),
        ({"role": "user", "content": "\ud800"}, "messages[0].content"),
        ({"role": ["user"], "content": [{"type": "text", "text": "a\udfffb"}]}, "messages[0].role"),
        ({"role": "user", "content": [{"type": "text", "text": "a\udfffb"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "image", "image": "http://a/\ud800"}]}, "messages[0].content[0].image"),
    ],
)
def test_messages_the_model_cannot_read_are_refused_by_name(server: FakeServer, message: Any, field: str) -> None:
    body = json.dumps({**CHAT, "messages": [message]}).encode()
    answer = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize("url", ["https://example.org/a.mp4", {"url": "https://example.org/a.mp4"}])
def test_video_urls_reach_the_engine_with_their_settings(server: FakeServer, url: Any) -> None:
    settings: Any = {"fps": 1.5, "max_pixels": 50_000, "total_pixels": 10**6}
    messages = [{"role": "user", "content": [{"type": "video_url", "video_url": url, **settings}]}]
    assert server.post("/v1/chat/completions", json={**CHAT, "messages": messages}).status_code == 200
    assert server.engine.part(0) == VideoPart("https://example.org/a.mp4", **settings)


def test_lists_of_frames_reach_the_engine_as_they_are(server: FakeServer) -> None:
    part = {"type": "video", "video": ["https://example.org/1.png", "https://example.org/2.png"], "max_pixels": 50_000}
    expected = VideoPart(("https://example.org/1.png", "https://example.org/2.png"), max_pixels=50_000)
    messages = [{"role": "user", "content": [part]}]
    assert server.post("/v1/chat/completions", json={**CHAT, "messages": messages}).status_code == 200
    assert server.engine.part(0) == expected
    assert server.post("/generate/multimodal", json={"messages": messages}).status_code == 200
    assert server.engine.part(0) == expected


def test_a_chat_stream_starts_every_sample_with_its_role_and_ends_with_the_usage(
    open_server: FakeServer, client: openai.OpenAI
) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    for index in (0, 1):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert [choice.delta.role for choice in choices] == ["assistant", None, None, None]
        assert "".join(choice.delta.content or "" for choice in choices) == f"ok #{index}"
        assert [choice.finish_reason for choice in choices] == [None, None, None, "stop"]
    assert last.choices == []
    assert last.usage
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (7, 4, 11)


def test_the_async_client_gets_the_whole_answer(open_server: FakeServer) -> None:
    async def ask() -> str | None:
        async with openai.AsyncOpenAI(base_url=f"{open_server.url}/v1", api_key="any") as client:
            answer = await client.chat.completions.create(model="fake", messages=HELLO)
            return answer.choices[0].message.content

    assert asyncio.run(ask()) == "ok #0"


def image_message(url: str, text: str = "What is this?") -> Any:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_the_openai_client_asks_about_a_picture(real: RealServer, picture: str) -> None:
    answer = real.client.chat.completions.create(
        model="tiny", messages=image_message(picture), max_tokens=8, temperature=0
    )
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_the_openai_client_streams_the_same_text(real: RealServer, picture: str) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "messages": image_message(picture),
        "max_tokens": 12,
        "seed": 5,
        "temperature": 1.0,
    }
    whole = real.client.chat.completions.create(**request)
    chunks = list(real.client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_penalties_and_biases_reach_the_model(real: RealServer) -> None:
    request: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    request |= {"model": "tiny", "logprobs": True}
    plain = real.client.chat.completions.create(**request).choices[0]
    biased = real.client.chat.completions.create(**request, logit_bias={"70": 100}).choices[0]
    assert biased.logprobs
    assert biased.logprobs.content
    assert {entry.token for entry in biased.logprobs.content} == {real.engine.token_bytes(70).decode()}
    assert biased.message.content != plain.message.content


def test_the_openai_client_gets_n_choices_and_stop_strings(real: RealServer) -> None:
    answer = real.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        n=3,
        max_completion_tokens=6,
        temperature=1.0,
        stop=["\n", "x"],
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert not any("\n" in (choice.message.content or "") for choice in answer.choices)


async def _ask_async(real: RealServer) -> str:
    async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key=REAL_KEY) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_the_async_openai_client_streams(real: RealServer) -> None:
    import asyncio

    whole = real.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0
    )
    assert asyncio.run(_ask_async(real)) == whole.choices[0].message.content


def test_the_settings_of_a_video_change_the_number_of_tokens(real: RealServer, clip: bytes) -> None:
    def tokens(video: Any, **settings: Any) -> int:
        messages = video_chat(video, **settings)
        answer = real.client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
        assert answer.usage
        return answer.usage.prompt_tokens

    words = tokens(data_url(clip), nframes=2, max_pixels=784) - 1
    assert tokens(data_url(clip), max_pixels=4 * 784) == words + 3 * 4  # 3 seconds, 6 frames, 4 tokens for each two
    assert tokens(data_url(clip), max_pixels=4 * 784, fps=4) == words + 6 * 4
    assert tokens(data_url(clip), max_pixels=784, nframes=10) == words + 5


BAD_CHATS = [
    ({"messages": []}, 400, "messages"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": ["hello"]}, 400, "messages[0]"),
    ({"messages": [{"role": "pilot", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, 400, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].image_url"),
    (
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}]},
        400,
        "messages[0].content[0].video_url",
    ),
    ({"max_tokens": -2}, 400, "max_tokens"),
    ({"max_tokens": "many"}, 400, "max_tokens"),
    ({"temperature": -0.5}, 400, "temperature"),
    ({"top_p": -0.1}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"seed": 1.5}, 400, "seed"),
    ({"stop": [1]}, 400, "stop"),
    ({"model": "gpt-9"}, 404, "model"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].function"),
    ({"presence_penalty": 2.5}, 400, "presence_penalty"),
    ({"logit_bias": {"1000000": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias.a"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages"),
    ({"max_pixels": -1}, 400, "max_pixels"),
]


@pytest.mark.parametrize(("change", "status", "field"), BAD_CHATS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_chats_are_refused_by_name(real: RealServer, stream: bool, change: Any, status: int, field: str) -> None:
    request = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": stream}
    answer = real.post("/v1/chat/completions", json=request | change)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["message"]


def test_usage_so_far_comes_with_every_chunk(open_server: FakeServer, client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(model="fake", messages=HELLO, stream=True, stream_options=options))
    used = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(used) == len(chunks)
    assert used == sorted(used)
    assert used[0] == 1
    assert used[-1] == 2


def test_a_chat_gives_token_ids_as_vllm(open_server: FakeServer, client: openai.OpenAI) -> None:
    asked: Any = {"model": "fake", "messages": HELLO, "extra_body": {"return_token_ids": True}}
    answer: Any = client.chat.completions.create(**asked).to_dict()
    assert answer["prompt_token_ids"] == list(range(7))
    assert answer["choices"][0]["token_ids"] == [1, 1]
    chunks: list[Any] = [chunk.to_dict() for chunk in client.chat.completions.create(**asked, stream=True)]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [list(range(7)), *[None] * (len(chunks) - 1)]
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())] == [1, 1]


def test_settings_of_media_come_in_vllms_form_too(server: FakeServer) -> None:
    settings = {"size": {"shortest_edge": 100, "longest_edge": 200}, "fps": 4, "max_pixels": 200}
    parts = [{"type": "video", "video": "https://x/a.mp4"}, {"type": "video", "video": "https://x/b.mp4", "fps": 1}]
    messages = [{"role": "user", "content": parts}]
    asked = {**CHAT, "messages": messages, "mm_processor_kwargs": settings | {"do_resize": True}}
    answer = server.post("/v1/chat/completions", json=asked)
    call = server.engine.calls[-1]
    assert (call.min_pixels, call.max_pixels) == (100, 200)
    assert [server.engine.part(number).fps for number in (0, 1)] == [4, 1]
    assert answer.headers[HEADER] == "mm_processor_kwargs.do_resize"


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("mm_processor_kwargs.fps", {"mm_processor_kwargs": {"fps": 0}}),
        ("mm_processor_kwargs.size", {"mm_processor_kwargs": {"size": 5}}),
        ("mm_processor_kwargs.max_pixels", {"mm_processor_kwargs": {"max_pixels": 5}, "max_pixels": 6}),
        ("continue_final_message", {"continue_final_message": True}),
        ("return_token_ids", {"return_token_ids": 1}),
    ],
)
def test_malformed_settings_are_named(server: FakeServer, field: str, asked: Any) -> None:
    answer = server.post("/v1/chat/completions", json=CHAT | asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_an_answer_may_continue_the_last_message(real: RealServer) -> None:
    given = [*HELLO, {"role": "assistant", "content": "The sky is"}]
    ending = {"add_generation_prompt": False, "continue_final_message": True}
    asked = {"model": "tiny", "messages": given, "max_tokens": 1, "return_token_ids": True}
    ids = real.post("/v1/chat/completions", json=asked | ending).json()["prompt_token_ids"]
    assert real.engine.detokenize(ids).endswith("The sky is")
    ended = real.post("/v1/chat/completions", json=asked).json()["prompt_token_ids"]
    assert not real.engine.detokenize(ended).endswith("The sky is")
