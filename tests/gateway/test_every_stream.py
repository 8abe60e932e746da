"""What holds for the streams of every route: comments while they wait, one line an event, ids, errors, keys."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from testing.fakes import HOLD, FakeEngine, piece

from mdi.core.config import GatewayConfig
from mdi.core.errors import LinkError
from mdi.gateway import streaming
from tests.gateway.conftest import CHAT, LONG_WAIT_S, FakeServer, serving

ROUTES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "x"},
    "/generate/multimodal": {"messages": CHAT["messages"]},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "fake", "prompt": "x"},
    "/v1/responses": {"model": "fake", "input": "x"},
    "/v1/messages": {"model": "fake", "messages": CHAT["messages"], "max_tokens": 16},
}
routes = pytest.mark.parametrize("path", ROUTES)


def events(answer: httpx.Response) -> list[Any]:
    """The JSON of a stream's events, read by lines as many clients do, with all of Unicode's line ends."""
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@routes
def test_a_stream_begins_before_its_first_token_and_comments_until_it_comes(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "STATUS_S", 0.05)
    monkeypatch.setattr(streaming, "COMMENT_S", 0.05)
    with serving(FakeEngine()) as server:
        server.engine.says(HOLD, piece("at last", "stop"))
        body = ROUTES[path] | {"stream": True}
        with httpx.stream("POST", server.url + path, json=body, timeout=LONG_WAIT_S) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            comments = 0
            while comments < 3:
                comments += next(lines) == ": keep-alive"
            server.engine.requests[0].resume()
            assert "at last" in "".join(lines)


@routes
def test_an_event_is_one_line_for_every_reader(open_server: FakeServer, path: str) -> None:
    text = "a\u2028b\u2029c\u0085d"
    open_server.engine.says(piece(text), piece("", "stop"))
    answer = open_server.post(path, json=ROUTES[path] | {"stream": True}, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert text in json.dumps(events(answer), ensure_ascii=False)


@routes
def test_an_error_in_the_middle_is_the_last_event(open_server: FakeServer, path: str) -> None:
    open_server.engine.says(piece("so far"), LinkError("the finisher was lost"))
    found = events(open_server.post(path, json=ROUTES[path] | {"stream": True}))
    assert "so far" in json.dumps(found)
    assert "the finisher was lost" in json.dumps(found[-1])


@routes
def test_a_client_that_leaves_cancels_its_request(open_server: FakeServer, path: str) -> None:
    open_server.engine.says(piece("so far"), HOLD)
    body = ROUTES[path] | {"stream": True}
    with httpx.stream("POST", open_server.url + path, json=body, timeout=LONG_WAIT_S) as answer:
        lines = answer.iter_lines()
        while "so far" not in next(lines):
            pass
    assert open_server.engine.requests[0].cancelled.wait(LONG_WAIT_S)


@routes
def test_a_key_is_asked_for_in_the_form_of_the_route(path: str, tmp_path: Any) -> None:
    (tmp_path / "keys.yaml").write_text("a: {key: k, requests_per_minute: 1}")
    with serving(FakeEngine(), GatewayConfig(api_keys_file=tmp_path / "keys.yaml")) as server:
        answers = [
            httpx.post(server.url + path, json=ROUTES[path], headers=headers, timeout=LONG_WAIT_S)
            for headers in ({}, {"x-api-key": "k"}, {"Authorization": "Bearer k"})
        ]
    assert [answer.status_code for answer in answers] == [401, 200, 429]
    for answer, kind in ((answers[0], "authentication_error"), (answers[2], "rate_limit_error")):
        content = answer.json()
        if path.startswith("/v1"):
            assert content["error"]["type"] == kind
            assert (content.get("type") == "error") == (path == "/v1/messages")
        else:
            assert "key" in content["detail"]
    assert int(answers[2].headers["retry-after"]) > 30
