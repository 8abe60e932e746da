"""The routes as real clients meet them: a real server on loopback, the official `openai` client, plain HTTP."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from testing.videos import encoded, numbered, sound

from mdi import Engine
from mdi.gateway.app import GatewayConfig, bind, create_app
from mdi.media import MediaPolicy

KEY = "secret-key"


@dataclass(frozen=True)
class Server:
    url: str
    engine: Engine

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def post(self, path: str, **request: Any) -> httpx.Response:
        return httpx.post(self.url + path, headers={"Authorization": f"Bearer {KEY}"}, timeout=60, **request)


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    config = GatewayConfig(api_key=KEY, max_body_bytes=2 * 2**20)
    with Engine(tiny_checkpoint, sequence_length=512, max_sequences=4, media=MediaPolicy(remote=False)) as engine:
        app = uvicorn.Server(uvicorn.Config(create_app(engine, config), port=0, log_level="error"))
        thread = threading.Thread(target=app.run)
        thread.start()
        while not app.started:
            time.sleep(0.01)
        port = app.servers[0].sockets[0].getsockname()[1]
        yield Server(f"http://127.0.0.1:{port}", engine)
        app.should_exit = True
        thread.join()


@pytest.fixture
def picture(photograph: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(photograph).decode()


@pytest.fixture(scope="module")
def clip() -> bytes:
    return encoded(numbered(30), fps=10)


def data_url(content: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(content).decode()


def guide_video(video: Any, **settings: Any) -> Any:
    part = {"type": "video"} | ({"video": video} if video else {}) | settings
    return [{"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}]


def image_message(url: str, text: str = "What is this?") -> Any:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def guide_message(image: str | None) -> Any:
    part = {"type": "image"} | ({"image": image} if image else {})
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]


def test_the_openai_client_asks_about_a_picture(server: Server, picture: str) -> None:
    answer = server.client.chat.completions.create(
        model="tiny", messages=image_message(picture), max_tokens=8, temperature=0
    )
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_the_openai_client_streams_the_same_text(server: Server, picture: str) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "messages": image_message(picture),
        "max_tokens": 12,
        "seed": 5,
        "temperature": 1.0,
    }
    whole = server.client.chat.completions.create(**request)
    chunks = list(server.client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_the_openai_client_gets_logprobs_of_chats(server: Server) -> None:
    request: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0}
    request |= {"model": "tiny", "logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True}}
    whole = server.client.chat.completions.create(**request).choices[0]
    chunks = [chunk.choices[0] for chunk in server.client.chat.completions.create(**request, stream=True)]
    assert whole.logprobs
    assert whole.logprobs.content
    told = whole.logprobs.content
    assert [entry.logprob for entry in told] == [entry.top_logprobs[0].logprob for entry in told]
    assert [len(entry.top_logprobs) for entry in told] == [3] * 5
    assert b"".join(bytes(entry.bytes or ()) for entry in told).decode(errors="replace") == whole.message.content
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content or ()]
    assert [(entry.token, entry.bytes) for entry in streamed] == [(entry.token, entry.bytes) for entry in told]
    for again, entry in zip(streamed, told, strict=True):  # of a prompt whose keys and values were kept
        assert again.logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_the_openai_client_gets_logprobs_of_completions(server: Server) -> None:
    request: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 5, "temperature": 0, "logprobs": 2}
    whole = server.client.completions.create(**request).choices[0]
    chunks = [chunk.choices[0] for chunk in server.client.completions.create(**request, stream=True)]
    assert whole.logprobs
    assert whole.logprobs.tokens
    assert whole.logprobs.token_logprobs
    assert whole.logprobs.top_logprobs
    assert whole.logprobs.text_offset
    for token, logprob, top in zip(
        whole.logprobs.tokens, whole.logprobs.token_logprobs, whole.logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())
    assert whole.logprobs.text_offset[0] == 0
    offsets = [offset for chunk in chunks if chunk.logprobs for offset in chunk.logprobs.text_offset or ()]
    assert offsets == whole.logprobs.text_offset


def test_penalties_and_biases_reach_the_model(server: Server) -> None:
    request: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    request |= {"model": "tiny", "logprobs": True}
    plain = server.client.chat.completions.create(**request).choices[0]
    biased = server.client.chat.completions.create(**request, logit_bias={"70": 100}).choices[0]
    assert biased.logprobs
    assert biased.logprobs.content
    assert {entry.token for entry in biased.logprobs.content} == {server.engine.token_bytes(70).decode()}
    assert biased.message.content != plain.message.content


def test_the_openai_client_gets_n_choices_and_stop_strings(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        n=3,
        max_completion_tokens=6,
        temperature=1.0,
        stop=["\n", "x"],
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert not any("\n" in (choice.message.content or "") for choice in answer.choices)


async def _ask_async(server: Server) -> str:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_the_async_openai_client_streams(server: Server) -> None:
    import asyncio

    whole = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0
    )
    assert asyncio.run(_ask_async(server)) == whole.choices[0].message.content


def test_the_openai_client_lists_models_and_completes_text(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").id == "tiny"
    whole = server.client.completions.create(model="tiny", prompt="Once", max_tokens=6, temperature=0)
    chunks = server.client.completions.create(model="tiny", prompt="Once", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_the_guides_routes_answer_with_samples(server: Server, picture: str) -> None:
    text = server.post(
        "/generate", json={"prompt": "Hi", "max_tokens": 5, "n_samples": 2, "temperature": 1.0, "seed": 1}
    )
    assert len(text.json()["samples"]) == 2
    request = {"messages": guide_message(picture), "max_tokens": 5, "n_samples": 1, "temperature": 0}
    assert len(server.post("/generate/multimodal", json=request).json()["samples"]) == 1


def test_uploads_give_the_answer_of_the_same_picture_in_json(server: Server, picture: str, photograph: bytes) -> None:
    settings = {"max_tokens": 6, "temperature": 0}
    expected = server.post("/generate/multimodal", json={"messages": guide_message(picture), **settings}).json()
    file = {"image": ("cup.png", photograph, "image/png")}
    fields = {name: str(value) for name, value in settings.items()}
    forms = [
        {"prompt": "What is this?"},
        {"messages": json.dumps(guide_message(None))},
        {"messages": json.dumps(guide_message("cup.png"))},
    ]
    for form in forms:
        assert server.post("/generate/multimodal", files=file, data={**fields, **form}).json() == expected


def test_a_video_is_answered_alike_however_it_comes(server: Server, clip: bytes) -> None:
    settings = {"max_tokens": 6, "temperature": 0}
    request = {"messages": guide_video(data_url(clip)), **settings}
    expected = server.post("/generate/multimodal", json=request).json()
    file = {"file": ("clip.mp4", clip, "video/mp4")}
    fields = {name: str(value) for name, value in settings.items()}
    forms = [
        {"prompt": "What happens?"},
        {"messages": json.dumps(guide_video(None))},
        {"messages": json.dumps(guide_video("clip.mp4"))},
    ]
    for form in forms:
        assert server.post("/generate/multimodal", files=file, data={**fields, **form}).json() == expected
    part: Any = {"type": "video_url", "video_url": {"url": data_url(clip)}}
    messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}]
    answer = server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=0)
    assert [answer.choices[0].message.content] == expected["samples"]


def test_the_settings_of_a_video_change_the_number_of_tokens(server: Server, clip: bytes) -> None:
    def tokens(video: Any, **settings: Any) -> int:
        messages = guide_video(video, **settings)
        answer = server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
        assert answer.usage
        return answer.usage.prompt_tokens

    words = tokens(data_url(clip), nframes=2, max_pixels=784) - 1
    assert tokens(data_url(clip), max_pixels=4 * 784) == words + 3 * 4  # 3 seconds, 6 frames, 4 tokens for each two
    assert tokens(data_url(clip), max_pixels=4 * 784, fps=4) == words + 6 * 4
    assert tokens(data_url(clip), max_pixels=784, nframes=10) == words + 5


def test_a_list_of_frames_is_a_video(server: Server, picture: str) -> None:
    request = {"messages": guide_video([picture] * 3, max_pixels=20_000), "max_tokens": 4, "temperature": 0}
    assert len(server.post("/generate/multimodal", json=request).json()["samples"]) == 1


@pytest.mark.parametrize(
    ("video", "settings", "field", "message"),
    [
        ("data:video/mp4;base64,!!!!", {}, "video", "base64"),
        ("data:video/mp4,hello", {}, "video", "known format"),
        (data_url(sound()), {}, "video", "no video"),
        ("http://example.org/cat.mp4", {}, "video", "data: URL"),
        ("/etc/passwd", {}, "video", "data: URL"),
        ([], {}, "messages[0].content[0].video", "video"),
        ([1], {}, "messages[0].content[0].video[0]", "image"),
        (["data:,x"], {"nframes": 2}, "messages[0].content[0].nframes", "list"),
        (["data:,x"], {"fps": 0}, "fps", "above 0"),
        (["data:,x"], {}, "video", "frame 0"),
        ({"url": "x"}, {}, "messages[0].content[0].video", "list of images"),
        (None, {}, "messages[0].content[0].video", "video"),
        ("CLIP", {"fps": 0}, "fps", "above 0"),
        ("CLIP", {"fps": "2"}, "messages[0].content[0].fps", "number"),
        ("CLIP", {"nframes": 3.5}, "messages[0].content[0].nframes", "whole number"),
        ("CLIP", {"nframes": 31}, "nframes", "only 30 frames"),
        ("CLIP", {"fps": 1, "nframes": 4}, "nframes", "not both"),
        ("CLIP", {"max_pixels": 10}, "max_pixels", "784"),
        ("CLIP", {"total_pixels": 0}, "total_pixels", "784"),
        ("CLIP", {"fps": 10}, "messages", "lower max_pixels, total_pixels, fps or nframes, or raise"),
        ("CLIP", {"speed": 2}, "messages[0].content[0].speed", "unknown"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_videos_are_refused_with_the_cause(
    server: Server, clip: bytes, video: Any, settings: Any, field: str, message: str
) -> None:
    request = {"messages": guide_video(data_url(clip) if video == "CLIP" else video, **settings), "max_tokens": 4}
    answer = server.post("/generate/multimodal", json=request)
    assert answer.status_code == 400
    assert answer.json()["field"] == field
    assert message in answer.json()["detail"]


def test_a_prompt_that_is_too_long_is_refused_by_its_own_name(server: Server) -> None:
    answer = server.post("/generate", json={"prompt": "x" * 600})
    assert (answer.status_code, answer.json()["field"]) == (400, "prompt")


def test_the_guides_routes_stream(server: Server) -> None:
    request = {"prompt": "Hi", "max_tokens": 5, "temperature": 0}
    whole = server.post("/generate", json=request).json()["samples"][0]
    lines = server.post("/generate", json={**request, "stream": True}).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert "".join(json.loads(line.removeprefix("data: "))["text"] for line in lines[:-1]) == whole


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
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": "many"}, 400, "max_tokens"),
    ({"temperature": -0.5}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"seed": 1.5}, 400, "seed"),
    ({"stop": [""]}, 400, "stop"),
    ({"model": "gpt-9"}, 404, "model"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
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
def test_bad_chats_are_refused_by_name(server: Server, stream: bool, change: Any, status: int, field: str) -> None:
    request = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": stream}
    answer = server.post("/v1/chat/completions", json=request | change)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["message"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,!!!!", "base64"),
        ("data:text/plain,hello", "image"),
        ("http://example.org/cat.png", "data: URL"),
        ("/etc/passwd", "data: URL"),
        ("file:///etc/passwd", "data: URL"),
        ("gopher://x/y", "gopher"),
    ],
)
def test_bad_pictures_are_refused_with_the_cause(server: Server, image: str, message: str) -> None:
    answer = server.post("/generate/multimodal", json={"messages": guide_message(image), "max_tokens": 4})
    assert answer.status_code == 400
    assert message in answer.json()["detail"]
    assert "/work" not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", '{"prompt": "x", "temperature": NaN}', "temperature"),
        ("/generate", '{"prompt": "x", "max_tokens": -3}', "max_tokens"),
        ("/generate", '{"prompt": "x", "surprise": 1}', "surprise"),
        ("/generate", '{"prompt": ', None),
        ("/generate", "[]", None),
        ("/generate", "{}", "prompt"),
        ("/generate/multimodal", '{"prompt": "x"}', "messages"),
        ("/generate/multimodal", "{not json", None),
        ("/generate/multimodal", '{"messages": [], "temperature": Infinity}', "temperature"),
    ],
)
def test_bad_bodies_are_refused_by_name(server: Server, path: str, body: str, field: str | None) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(server.url + path, content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["field"] == field


@pytest.mark.parametrize(
    ("form", "files", "message"),
    [
        ({"max_tokens": "4"}, 1, "messages"),
        ({"prompt": "x", "messages": "[]"}, 1, "not both"),
        ({"prompt": "x", "max_tokens": "four"}, 1, "max_tokens"),
        ({"messages": json.dumps([{"role": "user", "content": "no picture"}])}, 1, "1 image files"),
        ({"messages": json.dumps(guide_message(None))}, 0, "more image parts"),
    ],
)
def test_bad_forms_are_refused_with_the_cause(
    server: Server, photograph: bytes, form: dict[str, str], files: int, message: str
) -> None:
    uploads: list[Any] = [("image", ("a.png", photograph))] * files or [("padding", (None, "1"))]
    answer = server.post("/generate/multimodal", data=form, files=uploads)
    assert answer.status_code == 400
    assert message in answer.json()["detail"]


def test_a_wrong_key_is_refused_everywhere_but_at_health(server: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 401
        assert httpx.post(server.url + "/generate", json={"prompt": "x"}, headers=headers).status_code == 401
        assert httpx.get(server.url + "/health", headers=headers).json()["status"] == "ok"


def test_a_body_over_the_limit_is_refused_announced_or_not(server: Server) -> None:
    large = b'{"prompt": "' + b"x" * (3 * 2**20) + b'"}'
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    assert httpx.post(server.url + "/generate", content=large, headers=headers).status_code == 413

    def drip() -> Iterator[bytes]:
        for start in range(0, len(large), 65536):
            yield large[start : start + 65536]

    assert httpx.post(server.url + "/generate", content=drip(), headers=headers).status_code == 413


def test_unknown_paths_and_methods_answer_in_their_shape(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(server.url + "/v1/nothing", headers=headers).json()["error"]["message"]
    assert httpx.get(server.url + "/generate", headers=headers).status_code == 405


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(server: Server, stream: bool) -> None:
    body = json.dumps({"prompt": "Hi", "max_tokens": 450, "temperature": 0, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(6):  # more than there are slots
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"  # noqa: E501
            connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if stream:
                connection.recv(1)
    deadline = time.monotonic() + 5
    while server.engine._requests:
        assert time.monotonic() < deadline, "requests of clients that left are still running"
        time.sleep(0.01)


def test_a_port_in_use_is_named(server: Server) -> None:
    from mdi.core.errors import ConfigError

    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"{port}.*--port"):
        bind("127.0.0.1", port)
