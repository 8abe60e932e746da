"""Errors as HTTP: statuses, bodies, and what stays in the log."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import openai
import pytest
from testing.fakes import piece

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
from tests.gateway.conftest import CHAT, HELLO, REAL_KEY, FakeServer, RealServer

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
    server: FakeServer, error: Any, status: int, kind: str, stream: bool, at_once: bool
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
    server: FakeServer, caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    server.engine.refuse = lambda _: kind("/srv/secret")
    answer = server.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500
    message = answer.json()["error"]["message"]
    assert "secret" not in answer.text
    number = message.split()[2].rstrip(";")
    assert any(number in record.getMessage() and record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("error", "reported"),
    [(LinkError("node finisher broke"), "node finisher broke"), (CheckpointError("/srv/secret"), "internal error")],
)
def test_an_error_in_the_middle_of_a_stream_is_its_last_event(server: FakeServer, error: Any, reported: str) -> None:
    server.engine.says(piece("so far"), error)
    first, ours = server.events("/generate", prompt="x")
    assert first["text"] == "so far"
    assert reported in ours["detail"]
    *_, openais = server.events("/v1/chat/completions", **CHAT)
    assert reported in openais["error"]["message"]
    assert "secret" not in ours["detail"] + openais["error"]["message"]


def test_the_openai_client_raises_the_error_in_the_middle(open_server: FakeServer, client: openai.OpenAI) -> None:
    open_server.engine.says(piece("so far"), LinkError("node finisher broke"))
    stream = client.chat.completions.create(model="fake", messages=HELLO, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "so far"]
    with pytest.raises(openai.APIError, match="node finisher broke"):
        next(stream)


@pytest.mark.parametrize("path", ["/generate", "/generate/multimodal", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b"\xff\xfe", b"", b"null", b'"text"', b'{"n": ' + b"1" * 5000 + b"}", b'{"\\ud800": 1}'],
)
def test_bodies_that_are_no_request_are_the_clients_fault(server: FakeServer, path: str, body: bytes) -> None:
    answer = server.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json().keys() == ({"error"} if path.startswith("/v1") else {"detail", "field"})


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
        ("/generate/multimodal", '{"messages": [{"role": "user", "\\ud800": 1}]}', "messages[0].\ud800"),
        ("/generate/multimodal", '{"messages": [], "temperature": Infinity}', "temperature"),
    ],
)
def test_bad_bodies_are_refused_by_name(real: RealServer, path: str, body: str, field: str | None) -> None:
    headers = {"Authorization": f"Bearer {REAL_KEY}", "Content-Type": "application/json"}
    answer = httpx.post(real.url + path, content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["field"] == field


def test_json_sent_as_a_form_says_which_header_is_missing(server: FakeServer) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d sends
    answer = server.post("/generate", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 415
    assert "Content-Type: application/json" in answer.json()["detail"]


def test_unknown_paths_and_methods_answer_in_their_shape(real: RealServer) -> None:
    headers = {"Authorization": f"Bearer {REAL_KEY}"}
    assert httpx.get(real.url + "/v1/nothing", headers=headers).json()["error"]["message"]
    assert httpx.get(real.url + "/generate", headers=headers).status_code == 405


def test_a_wrong_method_is_told_those_of_the_path(server: FakeServer) -> None:
    for path, methods in (("/ping", "GET, POST"), ("/v1/responses/x", "DELETE, GET"), ("/v1/responses", "POST")):
        answer = httpx.request("PUT", server.url + path, headers=server.headers, timeout=60, verify=False)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_official_clients_wait_after_a_refusal_and_succeed(open_server: FakeServer) -> None:
    refusals = [OverloadedError("full"), OverloadedError("full")]

    def refuse(_: Any) -> Exception | None:
        return refusals.pop() if refusals else None

    open_server.engine.refuse = refuse
    with openai.OpenAI(base_url=f"{open_server.url}/v1", api_key=open_server.key, max_retries=1) as client:
        with pytest.raises(openai.RateLimitError):
            client.with_options(max_retries=0).chat.completions.create(model="fake", messages=HELLO)
        assert client.chat.completions.create(model="fake", messages=HELLO).choices[0].finish_reason == "stop"
    refusals.append(OverloadedError("full"))
    with anthropic.Anthropic(base_url=open_server.url, api_key=open_server.key, max_retries=1) as other:
        assert other.messages.create(model="fake", messages=HELLO, max_tokens=5).stop_reason == "end_turn"
    assert not refusals
