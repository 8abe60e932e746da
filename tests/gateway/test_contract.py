"""What the gateway hands to an engine and what it makes of its answers, errors and silences: against a scripted one."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import Request
from testing.fakes import HOLD, FakeEngine, echo, piece

from mdi.core.errors import (
    CheckpointError,
    ClosedError,
    ConfigError,
    InputError,
    LinkError,
    MediaError,
    ModelNotFoundError,
    OverloadedError,
    PromptTooLongError,
)
from mdi.core.messages import ImagePart, Message, TextPart, VideoPart
from mdi.core.sampling import SamplingParams
from mdi.engine import Piece, RecoveryStatus
from mdi.gateway.app import GatewayConfig, create_app
from mdi.gateway.streaming import events

KEY = "schlüssel"
HEADERS = httpx.Headers({b"Authorization": b"Bearer " + KEY.encode()})
HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT: dict[str, Any] = {"model": "fake", "messages": HELLO}
LONG_WAIT_S = 20.0


@dataclass(frozen=True)
class Server:
    url: str
    engine: FakeEngine

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def post(self, path: str, **request: Any) -> httpx.Response:
        headers = httpx.Headers(HEADERS)
        headers.update(request.pop("headers", None))
        return httpx.post(self.url + path, headers=headers, timeout=LONG_WAIT_S, **request)

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream, parsed; [DONE] as it is."""
        answer = self.post(path, json={**body, "stream": True})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.text.strip().split("\n\n")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@contextmanager
def serving(config: GatewayConfig) -> Iterator[Server]:
    engine = FakeEngine()
    app = uvicorn.Server(uvicorn.Config(create_app(engine, config), port=0, log_level="critical"))
    thread = threading.Thread(target=app.run)
    thread.start()
    while not app.started:
        time.sleep(0.01)
    yield Server(f"http://127.0.0.1:{app.servers[0].sockets[0].getsockname()[1]}", engine)
    app.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with serving(GatewayConfig(api_key=KEY, max_body_bytes=8 * 2**20, aliases=("gpt-4o", "org/name"))) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Server:
    shared.engine.reset()
    return shared


@pytest.fixture(scope="module")
def shared_open() -> Iterator[Server]:
    with serving(GatewayConfig()) as server:
        yield server


@pytest.fixture
def open_server(shared_open: Server) -> Server:
    """Without a key: the `openai` client can send ASCII only."""
    shared_open.engine.reset()
    return shared_open


@pytest.fixture
def client(open_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{open_server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


# What reaches the engine


def test_every_setting_of_the_openai_client_reaches_the_engine(open_server: Server, client: openai.OpenAI) -> None:
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


def test_every_setting_of_the_guides_route_reaches_the_engine(server: Server) -> None:
    settings = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.75, "top_k": 4, "min_p": 0.25, "seed": 3}
    server.post("/generate", json={"prompt": "x", "n_samples": 2, "stop": ["a", "b"], **settings})
    assert server.engine.calls[0].params == SamplingParams(n=2, stop=("a", "b"), **settings)  # type: ignore[arg-type]


def test_openai_messages_reach_the_engine_in_its_own_form(server: Server) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": "Hi", "name": "it", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]},
    ]
    assert server.post("/v1/chat/completions", json={**CHAT, "messages": messages}).status_code == 200
    assert server.engine.calls[0].prompt == (
        Message("system", "Be brief."),
        Message("assistant", "Hi"),
        Message("user", (ImagePart("data:image/png;base64,AAAA"), TextPart("What?"))),
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": False},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False},
        {"stream": None, "stop": None, "n": None, "max_tokens": None, "stream_options": None},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(server: Server, fields: dict[str, Any]) -> None:
    assert server.post("/v1/chat/completions", json={**CHAT, **fields}).status_code == 200


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("chat/completions", "tool_choice", "required"),
        ("chat/completions", "functions", [{"name": "f"}]),
        ("chat/completions", "response_format", {"type": "json_object"}),
        ("chat/completions", "top_logprobs", 2),
        ("chat/completions", "modalities", ["text", "audio"]),
        ("chat/completions", "logit_bias", {"5": 101}),
        ("chat/completions", "frequency_penalty", 2.5),
        ("chat/completions", "repetition_penalty", 0),
        ("chat/completions", "min_tokens", -1),
        ("chat/completions", "stop_token_ids", [-1]),
        ("chat/completions", "temprature", 0.5),
        ("chat/completions", "max_completion_tokens", -1),
        ("chat/completions", "stop", 5),
        ("completions", "echo", True),
        ("completions", "suffix", "x"),
        ("completions", "best_of", 3),
        ("completions", "logprobs", 21),
        ("completions", "prompt", []),
        ("completions", "prompt", {"a": 1}),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(
    server: Server, path: str, field: str, value: Any
) -> None:
    valid = CHAT if path == "chat/completions" else {"model": "fake", "prompt": "x"}
    answer = server.post(f"/v1/{path}", json={**valid, field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert field in answer.json()["error"]["message"]
    assert server.engine.calls == []


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": "x", "cache": 1}, "messages[0].cache"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].image_url"),
        ({"role": "user", "content": "\ud800"}, "messages[0].content"),
        ({"role": ["user"], "content": [{"type": "text", "text": "a\udfffb"}]}, "messages[0].role"),
        ({"role": "user", "content": [{"type": "text", "text": "a\udfffb"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "image", "image": "http://a/\ud800"}]}, "messages[0].content[0].image"),
    ],
)
def test_messages_the_model_cannot_read_are_refused_by_name(server: Server, message: Any, field: str) -> None:
    body = json.dumps({**CHAT, "messages": [message]}).encode()
    answer = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n_samples": 0}, "n_samples"),
        ({"n_samples": None}, "n_samples"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "font": 1}]}]}, "messages[0].content[0].font"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_the_guides_route_names_the_field_it_refuses(server: Server, fields: dict[str, Any], field: str) -> None:
    answer = server.post("/generate/multimodal", json={"messages": HELLO, **fields})
    assert answer.status_code == 400
    assert answer.json()["field"] == field
    assert field in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/generate", "/generate/multimodal", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b"\xff\xfe", b"", b"null", b'"text"', b'{"n": ' + b"1" * 5000 + b"}", b'{"\\ud800": 1}'],
)
def test_bodies_that_are_no_request_are_the_clients_fault(server: Server, path: str, body: bytes) -> None:
    answer = server.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json().keys() == ({"error"} if path.startswith("/v1") else {"detail", "field"})


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_temperature_that_is_no_number_is_refused_by_name(server: Server, value: str) -> None:
    body = json.dumps(CHAT)[:-1] + f', "temperature": {value}}}'
    answer = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temperature"


def test_json_sent_as_a_form_says_which_header_is_missing(server: Server) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d sends
    answer = server.post("/generate", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["detail"]


# Uploads


def images(*names: Any) -> str:
    parts = [{"type": "image"} | ({} if name is None else {"image": name}) for name in names]
    return json.dumps([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("names", "placed"),
    [
        ((None, None), [b"A", b"B"]),
        (("b.png", "a.png"), [b"B", b"A"]),
        (("a.png", None), [b"A", b"B"]),
        ((None, "a.png"), [b"B", b"A"]),
        (("a.png", "", "a.png"), [b"A", b"B", b"A"]),
        ((None, "https://example.org/c.png", None), [b"A", "https://example.org/c.png", b"B"]),
    ],
)
def test_uploads_go_where_the_messages_want_them(server: Server, names: Any, placed: list[Any]) -> None:
    files = [("images", ("a.png", b"A")), ("file", ("b.png", b"B"))]
    answer = server.post("/generate/multimodal", files=files, data={"messages": images(*names)})
    assert answer.status_code == 200
    assert [server.engine.part(number).source for number in range(len(placed))] == placed


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (images("a.png", None), "several uploaded files have that name"),
        (images(None), "messages place 1"),
        (images(None, None, None), "more image parts"),
        (images(["a.png"]), "messages place 0"),
        ('{"a": 1}', "messages"),
        ("[" * 50_000, "not valid JSON"),
    ],
)
def test_uploads_without_one_clear_place_are_refused(server: Server, messages: str, message: str) -> None:
    files = [("image", ("a.png", b"A")), ("image", ("a.png", b"B"))]
    answer = server.post("/generate/multimodal", files=files, data={"messages": messages})
    assert answer.status_code == 400
    assert message in answer.json()["detail"]


@pytest.mark.parametrize(
    "file",
    [
        ("video", ("clip", b"V")),
        ("videos", ("clip.bin", b"V", "application/octet-stream")),
        ("file", ("clip", b"V", "video/mp4")),
        ("files", ("clip.webm", b"V", "application/octet-stream")),  # what curl makes of it
    ],
)
def test_uploaded_videos_are_told_from_images(server: Server, file: Any) -> None:
    files = [("file", ("a.png", b"A", "image/png")), file, ("file", ("b.gif", b"B", "image/gif"))]
    kinds = ("video", "image", "image")
    messages = json.dumps([{"role": "user", "content": [{"type": kind} for kind in kinds]}])
    for form in ({"messages": messages}, {"prompt": "What?"}):
        assert server.post("/generate/multimodal", files=files, data=form).status_code == 200
        parts = [server.engine.part(number) for number in range(3)]
        contents = [(part.kind, part.source) for part in parts]
        assert sorted(contents) == [("image", b"A"), ("image", b"B"), ("video", b"V")]
    assert [kind for kind, _ in contents] == ["image", "video", "image"]  # with a prompt, in the form's order


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"type": "image"}], "1 video files were uploaded, but the messages place 0"),
        ([{"type": "video"}, {"type": "video"}], "more video parts than uploaded video files"),
        ([{"type": "video", "speed": 2}], "unknown field messages[0].content[0].speed"),
    ],
)
def test_uploaded_videos_without_one_clear_place_are_refused(server: Server, parts: Any, message: str) -> None:
    form = {"messages": json.dumps([{"role": "user", "content": parts}])}
    files = [("file", ("a.png", b"A"))] * (parts[0]["type"] == "image") + [("video", ("v.mp4", b"V"))]
    answer = server.post("/generate/multimodal", files=files, data=form)
    assert answer.status_code == 400
    assert message in answer.json()["detail"]


@pytest.mark.parametrize("url", ["https://example.org/a.mp4", {"url": "https://example.org/a.mp4"}])
def test_video_urls_reach_the_engine_with_their_settings(server: Server, url: Any) -> None:
    settings: Any = {"fps": 1.5, "max_pixels": 50_000, "total_pixels": 10**6}
    messages = [{"role": "user", "content": [{"type": "video_url", "video_url": url, **settings}]}]
    assert server.post("/v1/chat/completions", json={**CHAT, "messages": messages}).status_code == 200
    assert server.engine.part(0) == VideoPart("https://example.org/a.mp4", **settings)


def test_lists_of_frames_reach_the_engine_as_they_are(server: Server) -> None:
    part = {"type": "video", "video": ["https://example.org/1.png", "https://example.org/2.png"], "max_pixels": 50_000}
    expected = VideoPart(("https://example.org/1.png", "https://example.org/2.png"), max_pixels=50_000)
    messages = [{"role": "user", "content": [part]}]
    assert server.post("/v1/chat/completions", json={**CHAT, "messages": messages}).status_code == 200
    assert server.engine.part(0) == expected
    assert server.post("/generate/multimodal", json={"messages": messages}).status_code == 200
    assert server.engine.part(0) == expected


def test_a_forms_messages_may_hold_a_picture_of_many_megabytes(server: Server) -> None:
    url = "data:image/png;base64," + "A" * (3 * 2**20)
    files = [("image", ("a.png", b"A"))]
    answer = server.post("/generate/multimodal", files=files, data={"messages": images(url, None)})
    assert answer.status_code == 200
    assert server.engine.part(0).source == url


def test_a_forms_settings_reach_the_engine(server: Server) -> None:
    form = {"prompt": "[What?]", "n_samples": "2", "temperature": "0.5", "stop": '["a"]', "max_pixels": "300"}
    answer = server.post("/generate/multimodal", files={"file": ("a.png", b"A")}, data=form)
    assert answer.status_code == 200
    call = server.engine.calls[0]
    assert call.params == SamplingParams(n=2, temperature=0.5, stop=("a",))
    assert call.max_pixels == 300
    assert [server.engine.part(0).source, server.engine.part(1).text] == [b"A", "[What?]"]


# Answers


def test_a_chat_stream_starts_every_sample_with_its_role_and_ends_with_the_usage(
    open_server: Server, client: openai.OpenAI
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


def test_the_async_client_gets_the_whole_answer(open_server: Server) -> None:
    async def ask() -> str | None:
        async with openai.AsyncOpenAI(base_url=f"{open_server.url}/v1", api_key="any") as client:
            answer = await client.chat.completions.create(model="fake", messages=HELLO)
            return answer.choices[0].message.content

    assert asyncio.run(ask()) == "ok #0"


def test_several_prompts_are_numbered_on_and_counted_together(open_server: Server, client: openai.OpenAI) -> None:
    expected = ["a #0", "a #1", "b #0", "b #1"]
    answer = client.completions.create(model="fake", prompt=["a", "b"], n=2)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (14, 8)

    texts = ["", "", "", ""]
    for chunk in client.completions.create(model="fake", prompt=["a", "b"], n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_several_prompts_run_all_or_none(server: Server) -> None:
    server.engine.says(HOLD)
    server.engine.refuse = lambda prompt: OverloadedError("full") if prompt == "b" else None
    answer = server.post("/v1/completions", json={"model": "fake", "prompt": ["a", "b"]})
    assert answer.status_code == 429
    assert server.engine.requests[0].cancelled.is_set()


def test_the_model_answers_to_its_aliases(server: Server) -> None:
    listed = httpx.get(server.url + "/v1/models", headers=HEADERS).json()["data"]
    assert [model["id"] for model in listed] == ["fake", "gpt-4o", "org/name"]
    assert httpx.get(server.url + "/v1/models/org/name", headers=HEADERS).json()["id"] == "org/name"
    assert server.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4o"}).json()["model"] == "fake"


def test_an_unknown_model_is_not_found_as_the_openai_client_expects(open_server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here: ask for 'fake'") as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


# Errors

ERRORS = [
    (InputError("no such thing", "seed"), 400, "invalid_request_error"),
    (MediaError("no image", "messages[0].content[0]"), 400, "invalid_request_error"),
    (PromptTooLongError("too long", "messages"), 400, "invalid_request_error"),
    (ModelNotFoundError("not here", "model"), 404, "not_found_error"),
    (OverloadedError("full"), 429, "rate_limit_error"),
    (LinkError("node finisher broke"), 503, "server_error"),
    (ClosedError("closing"), 503, "server_error"),
]


@pytest.mark.parametrize(("error", "status", "kind"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_an_error_before_the_first_token_has_its_status_in_both_shapes(
    server: Server, error: Any, status: int, kind: str, stream: bool, at_once: bool
) -> None:
    if at_once:
        server.engine.refuse = lambda _: error
    else:
        server.engine.says(error)
    field = getattr(error, "field", None)
    ours = server.post("/generate", json={"prompt": "x", "stream": stream})
    openais = server.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert (ours.status_code, openais.status_code) == (status, status)
    assert ours.json() == {"detail": str(error), "field": field}
    body = openais.json()["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert (body["message"], body["type"], body["param"]) == (str(error), kind, field)
    assert ("retry-after" in ours.headers) == ("retry-after" in openais.headers) == (status == 429)


@pytest.mark.parametrize("kind", [RuntimeError, ConfigError, CheckpointError])
def test_what_is_not_the_clients_to_know_is_logged_under_a_number(
    server: Server, caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    server.engine.refuse = lambda _: kind("/srv/secret")
    answer = server.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500
    message = answer.json()["error"]["message"]
    assert "secret" not in answer.text
    number = message.split()[2].rstrip(";")
    assert any(number in record.getMessage() and record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("error", "told"),
    [(LinkError("node finisher broke"), "node finisher broke"), (CheckpointError("/srv/secret"), "internal error")],
)
def test_an_error_in_the_middle_of_a_stream_is_its_last_event(server: Server, error: Any, told: str) -> None:
    server.engine.says(piece("so far"), error)
    first, ours = server.events("/generate", prompt="x")
    assert first["text"] == "so far"
    assert told in ours["detail"]
    *_, openais = server.events("/v1/chat/completions", **CHAT)
    assert told in openais["error"]["message"]
    assert "secret" not in ours["detail"] + openais["error"]["message"]


def test_the_openai_client_raises_the_error_in_the_middle(open_server: Server, client: openai.OpenAI) -> None:
    open_server.engine.says(piece("so far"), LinkError("node finisher broke"))
    stream = client.chat.completions.create(model="fake", messages=HELLO, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "so far"]
    with pytest.raises(openai.APIError, match="node finisher broke"):
        next(stream)


def test_an_answer_past_the_time_limit_is_cancelled_and_told() -> None:
    with serving(GatewayConfig(request_timeout_s=0.2)) as server:
        server.engine.says(HOLD)
        for stream in (False, True):
            answer = server.post("/v1/chat/completions", json={**CHAT, "stream": stream})
            assert answer.status_code == 504
            assert "longer than 0.2 s" in answer.json()["error"]["message"]
        server.engine.says(piece("so far"), HOLD)
        first, last = server.events("/generate", prompt="x")
        assert first["text"] == "so far"
        assert "longer than 0.2 s" in last["detail"]
        assert len(server.engine.requests) == 3
        assert all(request.cancelled.wait(LONG_WAIT_S) for request in server.engine.requests)


def test_health_tells_of_a_lost_node_without_a_key(server: Server) -> None:
    server.engine.error = LinkError("node finisher broke")
    answer = httpx.get(server.url + "/health")
    assert answer.status_code == 503
    assert answer.json() == {"status": "unavailable", "detail": "node finisher broke"}
    server.engine.answer_ready = lambda: False
    assert httpx.get(server.url + "/health/ready").json() == answer.json()


def test_the_server_is_ready_when_a_token_comes_through(server: Server) -> None:
    answer = httpx.get(server.url + "/health/ready")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("recovering", [True, False])
def test_a_server_that_is_not_ready_says_when_to_ask_again(server: Server, recovering: bool) -> None:
    server.engine.answer_ready = lambda: False
    server.engine.recovery = RecoveryStatus(recovering, recoveries=3, failed_requests=0)
    answer = httpx.get(server.url + "/health/ready")
    status = "recovering" if recovering else "busy"
    assert (answer.status_code, answer.json()) == (503, {"status": status})
    assert int(answer.headers["retry-after"]) > 0
    assert httpx.get(server.url + "/health").json()["status"] == ("recovering" if recovering else "ok")


def test_who_asks_at_the_same_time_shares_one_token(server: Server) -> None:
    asked, answer = [], threading.Event()

    def ready() -> bool:
        asked.append(1)
        return answer.wait(LONG_WAIT_S)

    server.engine.answer_ready = ready
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(httpx.get, server.url + "/health/ready", timeout=LONG_WAIT_S) for _ in range(8)]
        assert httpx.get(server.url + "/health").status_code == 200  # meanwhile
        time.sleep(0.3)
        answer.set()
        assert {answer.result().status_code for answer in answers} == {200}
    assert len(asked) <= 2  # on a busy machine, some may come after the answer


def test_nodes_are_shown_with_what_they_hold_and_do(server: Server) -> None:
    server.engine.recovery = RecoveryStatus(recovering=False, recoveries=3, failed_requests=2)
    answer = httpx.get(server.url + "/v1/nodes", headers=HEADERS).json()
    assert (answer["recovering"], answer["recoveries"], answer["failed_requests"]) == (False, 3, 2)
    [node] = answer["nodes"]
    assert (node["name"], node["state"], node["first_layer"], node["last_layer"]) == ("starter", "ready", 0, 2)
    assert {"resident_bytes", "pid", "busy_share", "sent_bytes", "received_bytes", "round_trip_s", "restarts"} < {*node}


# Keys


@pytest.mark.parametrize("header", [None, b"Bearer", b"Basic " + KEY.encode(), b"Bearer x", KEY.encode()])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nodes", "/docs", "/openapi.json", "/nothing"])
def test_nothing_but_health_is_shown_without_the_key(server: Server, header: bytes | None, path: str) -> None:
    headers = {} if header is None else {b"Authorization": header}
    answer = httpx.get(server.url + path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_scheme_of_the_key_is_read_in_any_case(server: Server) -> None:
    answer = httpx.get(server.url + "/v1/models", headers={b"Authorization": b"bearer " + KEY.encode()})
    assert answer.status_code == 200


def test_an_empty_key_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="empty"):
        GatewayConfig(api_key="")


# Clients that leave


def leave(server: Server, *, stream: bool, after: bytes) -> None:
    """Asks, reads until `after` has come (nothing: until the engine has the request), and hangs up."""
    body = json.dumps({"prompt": "x", "stream": stream}).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n" % (KEY.encode(), len(body))
    with socket.create_connection(("127.0.0.1", server.port), timeout=LONG_WAIT_S) as connection:
        connection.sendall(head + body)
        assert server.engine.submitted.wait(LONG_WAIT_S)
        received = b""
        while after not in received:
            received += connection.recv(4096)


@pytest.mark.parametrize(
    ("stream", "steps", "after"),
    [
        (False, (HOLD,), b""),
        (False, (piece("so far"), HOLD), b""),
        (True, (HOLD,), b""),
        (True, (piece("so far"), HOLD), b"so far"),
    ],
    ids=["whole, waiting", "whole, midway", "stream, before the first token", "stream, midway"],
)
def test_a_client_that_leaves_cancels_its_request_without_noise(
    server: Server, caplog: pytest.LogCaptureFixture, stream: bool, steps: Any, after: bytes
) -> None:
    server.engine.says(*steps)
    leave(server, stream=stream, after=after)
    assert server.engine.requests[0].cancelled.wait(LONG_WAIT_S)
    server.engine.script = echo
    assert server.post("/generate", json={"prompt": "x"}).json() == {"samples": ["x #0"]}
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_finished_request_is_not_cancelled(server: Server) -> None:
    assert server.post("/generate", json={"prompt": "x"}).status_code == 200
    assert server.events("/generate", prompt="x")[-1] == "[DONE]"
    assert not any(request.cancelled.is_set() for request in server.engine.requests)


def test_a_client_that_left_just_before_its_stream_began_cancels_it() -> None:
    engine = FakeEngine()
    engine.says(piece("first"), HOLD)

    scope: Any = {"type": "http", "path": "/generate", "method": "POST", "headers": [], "query_string": b""}

    async def stalled(*_message: Any) -> Any:
        await asyncio.Event().wait()

    async def left() -> Any:
        return {"type": "http.disconnect"}

    async def render(pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
        async for given in pieces:
            yield {"text": given.text}

    async def run() -> None:
        response = await events(Request(scope, stalled), engine.submit("x"), None, render)
        await response(scope, left, stalled)

    asyncio.run(run())
    assert engine.requests[0].cancelled.is_set()
