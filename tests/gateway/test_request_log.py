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
from tests.gateway.conftest import CHAT, HELLO, LONG_WAIT_S, FakeServer, serving

ID = "x-request-id"


class Lines:
    """The access log. Other programs may meet this server's port: lines are found by what the test sends."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "mdi.access")
        self._caplog = caplog

    def one_with(self, text: str) -> str:
        """The line that holds a text; an answer can arrive before its line is written."""
        deadline = time.monotonic() + 20
        while not (found := self.all_with(text)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        [line] = found
        return line

    def all_with(self, text: str) -> list[str]:
        return [line for line in self._caplog.messages if text in line]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    return Lines(caplog)


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
    answers += [
        server.get("/none"),
        server.get("/health"),
        httpx.get(server.url + "/v1/models", verify=False, timeout=LONG_WAIT_S),
    ]
    assert [answer.status_code for answer in answers] == [500, 400, 404, 404, 200, 401]
    assert len({answer.headers[ID] for answer in answers}) == len(answers)
    assert all(len(answer.headers.get_list(ID)) == 1 for answer in answers)


def test_the_openai_client_names_the_request(open_server: FakeServer) -> None:
    with open_server.client as client:
        done = client.chat.completions.create(model="fake", messages=HELLO, extra_headers={ID: "mine"})
    assert done._request_id == "mine"


def test_a_line_says_who_asked_what_and_what_it_took(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeEngine(), GatewayConfig(api_keys=("secret-key",))) as server:
        server.post("/v1/chat/completions?x=secret", json=CHAT, headers={ID: "a"})
        server.post("/v1/chat/completions", json={}, headers={ID: "b"})
        httpx.get(server.url + "/v1/models", headers={ID: "c"}, verify=False, timeout=LONG_WAIT_S)
        httpx.get(server.url + "/a%0Ab", headers={ID: "d", **server.headers}, verify=False, timeout=LONG_WAIT_S)
        found = [lines.one_with(f" id={name}").split() for name in "abcd"]
        server.get("/health")
    assert [" ".join(parts[:4]) for parts in found] == [
        '127.0.0.1 "POST /v1/chat/completions" 200',
        '127.0.0.1 "POST /v1/chat/completions" 400',
        '127.0.0.1 "GET /v1/models" 401',
        '127.0.0.1 "GET /a%0Ab" 404',
    ]
    assert [parts[5:7] for parts in found] == [
        ["key=key-1", "tokens=7+2"],
        ["key=key-1", "tokens=0+0"],
        ["key=-", "tokens=0+0"],
        ["key=key-1", "tokens=0+0"],
    ]
    assert lines.all_with("/health") == []
    assert "secret" not in caplog.text


def test_a_line_names_what_went_wrong_in_the_middle(lines: Lines) -> None:
    """An answer that had begun, and a client that leaves."""
    with serving(FakeEngine()) as server:
        server.engine.says(piece("a"), LinkError("lost"))
        server.events("/v1/chat/completions", **CHAT)
        assert " 200 error=503 " in lines.one_with("/v1/chat")
        server.engine.says(piece("a"), HOLD, piece("b", "stop"))
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream(
            "POST", url, json={**CHAT, "stream": True}, headers={ID: "left"}, timeout=LONG_WAIT_S
        ) as answer:
            next(answer.iter_lines())
        line = lines.one_with("id=left")
        assert '"POST /v1/chat/completions" 499' in line
        assert "tokens=7+1" in line


def test_a_failing_health_check_has_a_line(lines: Lines) -> None:
    with serving(FakeEngine()) as server:
        server.engine.error = LinkError("gone")
        server.get("/health")
        assert '"GET /health" 503' in lines.one_with("/health")


def test_without_an_option_nothing_is_logged_by_a_library(caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeEngine()) as server:
        server.get("/v1/models")
        with socket.create_connection(("127.0.0.1", server.port)):
            pass
    assert [record.getMessage() for record in caplog.records if record.name.startswith(("mdi", "uvicorn"))] == []
