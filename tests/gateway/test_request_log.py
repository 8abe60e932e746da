"""The id of a request, and its line in the log."""

from __future__ import annotations

import logging
import socket
import time

import httpx
import pytest
from testing.fakes import HOLD, FakeEngine, piece

from mdi.core.config import GatewayConfig
from mdi.core.errors import LinkError
from tests.gateway.conftest import CHAT, HELLO, FakeServer, serving

ID = "x-request-id"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of the access log, as they come."""
    caplog.set_level(logging.INFO, "mdi.access")
    return caplog.messages


def wait_for(lines: list[str], caplog: pytest.LogCaptureFixture, n: int) -> list[str]:
    """The answer can arrive before its line is written."""
    deadline = time.monotonic() + 20
    while len(caplog.messages) < n:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return caplog.messages


@pytest.mark.parametrize("given", ["abc", "7f3c:1/2+3=@x.y_z-0", "x" * 128])
def test_a_client_s_id_comes_back(open_server: FakeServer, given: str) -> None:
    assert open_server.post("/v1/chat/completions", json=CHAT, headers={ID: given}).headers[ID] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a"b', "a\x7fb", "ü"])
def test_an_id_that_a_log_could_misread_is_replaced(open_server: FakeServer, given: str) -> None:
    answer = open_server.post("/v1/chat/completions", json=CHAT, headers={ID: given.encode()})
    assert answer.status_code == 200
    assert answer.headers[ID] != given
    assert len(answer.headers[ID]) == 32


def test_every_answer_has_an_id_of_its_own(server: FakeServer) -> None:
    """Errors as well, the unforeseen ones too, and each once."""
    server.engine.refuse = lambda _: RuntimeError("x")
    answers = [server.post("/v1/chat/completions", json=body) for body in (CHAT, {}, {"model": "x", "messages": HELLO})]
    answers += [server.get("/none"), server.get("/health"), httpx.get(server.url + "/v1/models", verify=False)]
    assert [answer.status_code for answer in answers] == [500, 400, 404, 404, 200, 401]
    assert len({answer.headers[ID] for answer in answers}) == len(answers)
    assert all(len(answer.headers.get_list(ID)) == 1 for answer in answers)


def test_the_openai_client_names_the_request(open_server: FakeServer) -> None:
    with open_server.client as client:
        done = client.chat.completions.create(model="fake", messages=HELLO, extra_headers={ID: "mine"})
    assert done._request_id == "mine"


def test_a_line_says_who_asked_what_and_what_it_took(lines: list[str], caplog: pytest.LogCaptureFixture) -> None:
    config = GatewayConfig(api_keys=("secret-key",))
    with serving(FakeEngine(), config) as server:
        server.post("/v1/chat/completions?x=secret", json=CHAT, headers={ID: "a"})
        server.post("/v1/chat/completions", json={}, headers={ID: "b"})
        httpx.get(server.url + "/v1/models", headers={ID: "c"}, verify=False)
        server.get("/health")
        server.get("/a%0Ab")
        found = wait_for(lines, caplog, 4)
    parts = [line.split() for line in found]
    assert all(line[0] == "127.0.0.1" for line in parts)
    assert [" ".join(line[1:4]) for line in parts] == [
        '"POST /v1/chat/completions" 200',
        '"POST /v1/chat/completions" 400',
        '"GET /v1/models" 401',
        '"GET /a%0Ab" 404',
    ]
    assert [line[5:7] for line in parts] == [
        ["key=key-1", "tokens=7+2"],
        ["key=key-1", "tokens=0+0"],
        ["key=-", "tokens=0+0"],
        ["key=key-1", "tokens=0+0"],
    ]
    assert [line[7] for line in parts[:3]] == ["id=a", "id=b", "id=c"]
    assert "secret" not in caplog.text


def test_a_line_names_what_went_wrong_in_the_middle(lines: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """An answer that had begun, and a client that leaves."""
    with serving(FakeEngine()) as server:
        server.engine.says(piece("a"), LinkError("lost"))
        server.events("/v1/chat/completions", **CHAT)
        assert " 200 error=503 " in wait_for(lines, caplog, 1)[0]
        server.engine.says(piece("a"), HOLD, piece("b", "stop"))
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            next(answer.iter_lines())
        line = wait_for(lines, caplog, 2)[1]
        assert '"POST /v1/chat/completions" 499' in line
        assert "tokens=7+1" in line


def test_a_failing_health_check_has_a_line(lines: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeEngine()) as server:
        server.engine.error = LinkError("gone")
        server.get("/health")
        assert '"GET /health" 503' in wait_for(lines, caplog, 1)[0]


def test_without_an_option_nothing_is_logged_by_a_library(caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeEngine()) as server:
        server.get("/v1/models")
        with socket.create_connection(("127.0.0.1", server.port)):
            pass
    assert caplog.messages == []
