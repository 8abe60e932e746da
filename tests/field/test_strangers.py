"""Clients that are slow, many or silent, and clients that must not be kept waiting without a word."""

from __future__ import annotations

import json
import logging
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import openai
import pytest
from testing.fakes import HOLD, FakeEngine, piece

from mdi.core.config import GatewayConfig
from mdi.core.errors import InputError, OverloadedError
from mdi.gateway import streaming
from tests.gateway.conftest import CHAT, HELLO, LONG_WAIT_S, FakeServer, serving

HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: loc"
HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def connect(server: FakeServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=LONG_WAIT_S)


def health(connection: socket.socket) -> bytes:
    """Asks for /health on an open connection; the whole answer."""
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(4096)
    return answer


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG_WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams begin, and comments come, at once."""
    monkeypatch.setattr(streaming, "STATUS_S", 0.05)
    monkeypatch.setattr(streaming, "COMMENT_S", 0.05)


@pytest.mark.usefixtures("chatty")
def test_a_stream_begins_before_its_first_token_and_comments_until_it_comes() -> None:
    """B5: the head and comment lines arrive while the request waits in the queue."""
    with serving(FakeEngine()) as server:
        server.engine.says(HOLD, piece("at last", "stop"))
        ask = {**CHAT, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=ask, timeout=LONG_WAIT_S) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(4)] == [": keep-alive", "", ": keep-alive", ""]
            server.engine.requests[0].resume()
            assert "at last" in "".join(lines)


@pytest.mark.usefixtures("chatty")
def test_the_openai_client_reads_a_stream_with_comments() -> None:
    """B5: comments are no events."""
    with serving(FakeEngine()) as server, server.client as client, ThreadPoolExecutor() as pool:
        server.engine.says(HOLD, piece("at"), HOLD, piece(" last", "stop"))
        stream = client.chat.completions.create(model="fake", messages=HELLO, stream=True)

        def resume() -> None:
            for _ in range(2):
                time.sleep(0.3)
                server.engine.requests[0].resume()

        pool.submit(resume)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "at last"


@pytest.mark.usefixtures("chatty")
def test_an_error_known_at_once_is_a_status_and_a_later_one_the_last_event() -> None:
    """B5: what `submit` refuses, and what fails before the stream began, has its own status."""
    with serving(FakeEngine()) as server, server.client as client:
        ask = {**CHAT, "stream": True}
        server.engine.refuse = lambda _: OverloadedError("full")
        assert server.post("/v1/chat/completions", json=ask).status_code == 429
        server.engine.refuse = lambda _: None
        server.engine.says(InputError("the image is damaged", "messages"))
        assert server.post("/v1/chat/completions", json=ask).status_code == 400
        server.engine.says(HOLD, InputError("the image cannot be fetched", "messages"))
        stream = client.chat.completions.create(model="fake", messages=HELLO, stream=True)
        server.engine.requests[-1].resume()
        with pytest.raises(openai.APIError, match="cannot be fetched"):
            list(stream)


@pytest.mark.slow
def test_an_idle_connection_is_there_when_its_client_comes_back() -> None:
    """B6: pools of clients keep connections for longer than 5 s."""
    with serving(FakeEngine()) as server, connect(server) as connection:
        for _ in range(2):
            assert health(connection).startswith(b"HTTP/1.1 200")
            time.sleep(7)


@pytest.mark.parametrize("part", [HALF_A_HEAD, b""], ids=["half a head", "nothing"])
def test_a_head_that_does_not_come_ends_the_connection(part: bytes) -> None:
    """D6: with a status, where something had come."""
    with serving(FakeEngine(), GatewayConfig(head_timeout_s=0.3)) as server, connect(server) as connection:
        connection.sendall(part)
        assert b" 408 " in connection.makefile("rb").read()


def test_a_head_that_drips_ends_the_connection_as_well() -> None:
    """D6: the time is for the whole head, not for the next byte of it."""
    with serving(FakeEngine(), GatewayConfig(head_timeout_s=0.5)) as server, connect(server) as connection:
        connection.sendall(HALF_A_HEAD)
        connection.settimeout(0.2)
        for _ in range(100):
            connection.sendall(b"a")
            try:
                assert b" 408 " in connection.recv(4096)
                break
            except TimeoutError:
                continue
        else:
            pytest.fail("a head that takes 20 s is still awaited")


def test_the_next_request_on_a_connection_has_the_whole_time_again() -> None:
    """D6: an idle connection is not a slow head."""
    with serving(FakeEngine()) as server, connect(server) as client:
        for _ in range(2):
            assert health(client).startswith(b"HTTP/1.1 200")
            [connection] = server.http._connections
            assert not connection.overdue(head_s=0, stall_s=0)
        client.sendall(HALF_A_HEAD)
        wait_until(lambda: connection.overdue(head_s=0, stall_s=0))


def test_a_body_that_stops_ends_the_connection() -> None:
    """D6: with a status, and without a trace in the engine."""
    with serving(FakeEngine(), GatewayConfig(stall_timeout_s=0.3)) as server, connect(server) as connection:
        connection.sendall(HEAD % 100 + b'{"prompt": ')
        assert b" 408 " in connection.makefile("rb").read()
        assert server.engine.calls == []


def test_a_stream_that_is_not_read_ends_with_its_request() -> None:
    """D6: a client that holds a stream without reading it is cut."""
    with serving(FakeEngine(), GatewayConfig(stall_timeout_s=0.3)) as server, connect(server) as connection:
        server.engine.says(*[piece("x" * 2**20)] * 64, HOLD)
        body = b'{"prompt": "x", "stream": true}'
        connection.sendall(HEAD % len(body) + body)
        assert server.engine.submitted.wait(LONG_WAIT_S)
        assert server.engine.requests[0].cancelled.wait(LONG_WAIT_S)


def test_a_long_answer_is_no_stall() -> None:
    """D6: limits are on what the client owes, not on how long the model takes."""
    with serving(FakeEngine()) as server, ThreadPoolExecutor() as pool:
        server.engine.says(HOLD, piece("at last", "stop"))
        answer = pool.submit(server.post, "/generate", json={"prompt": "x"})
        assert server.engine.submitted.wait(LONG_WAIT_S)
        [connection] = server.http._connections
        assert not connection.overdue(head_s=0, stall_s=0)
        server.engine.requests[0].resume()
        assert answer.result().json() == {"samples": ["at last"]}


def test_silent_connections_make_room_for_requests(caplog: pytest.LogCaptureFixture) -> None:
    """D6: beyond the limit the longest silent ones are closed; running requests are not; one line in the log."""
    with serving(FakeEngine(), GatewayConfig(max_connections=8)) as server, ExitStack() as silent:
        server.engine.says(piece("so far"), HOLD, piece(", and on", "stop"))
        with ThreadPoolExecutor() as pool:
            running = pool.submit(server.post, "/generate", json={"prompt": "x"})
            assert server.engine.submitted.wait(LONG_WAIT_S)
            for _ in range(40):
                silent.enter_context(connect(server)).sendall(HALF_A_HEAD)
            for _ in range(3):
                assert server.get("/health").status_code == 200
            server.engine.requests[0].resume()
            assert running.result().json() == {"samples": ["so far, and on"]}
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_where_all_connections_run_requests_a_further_one_is_refused() -> None:
    """D6: nobody's request ends for another's."""
    with serving(FakeEngine(), GatewayConfig(max_connections=2)) as server, ThreadPoolExecutor() as pool:
        server.engine.says(HOLD, piece("at last", "stop"))
        running = [pool.submit(server.post, "/generate", json={"prompt": "x"}) for _ in range(2)]
        wait_until(lambda: len(server.engine.requests) == 2)
        with connect(server) as further:
            assert further.makefile("rb").read().startswith(b"HTTP/1.1 503 ")
        for request in server.engine.requests:
            request.resume()
        assert [each.result().json() for each in running] == [{"samples": ["at last"]}] * 2


def test_a_body_in_tiny_chunks_is_refused() -> None:
    """B4: reading each chunk costs as much as reading a thousand bytes; streams would wait for seconds."""
    with serving(FakeEngine()) as server, connect(server) as connection:
        head = HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")
        connection.sendall(head + b"1\r\nx\r\n" * 100_000)
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 400 ")
        assert server.engine.calls == []


@pytest.mark.parametrize("size", [40, 70_000])
def test_a_body_in_chunks_is_read(size: int) -> None:
    """B4: of any usual size."""
    text = json.dumps({"prompt": "x" * 100_000}).encode()
    parts = (text[start : start + size] for start in range(0, len(text), size))
    with serving(FakeEngine()) as server:
        assert server.post("/generate", content=parts, headers={"Content-Type": "application/json"}).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nx",
    ],
    ids=["TLS", "two hosts", "long head", "broken chunks", "websocket"],
)
def test_what_is_not_http_is_answered_without_a_line_in_the_log(sent: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """D6: strangers cannot fill the log."""
    with serving(FakeEngine()) as server:
        with connect(server) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            connection.makefile("rb").read()
        assert server.get("/health").status_code == 200
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_thousand_half_heads_leave_the_server_open_to_others() -> None:
    """D6: with 1,024 open files, other clients are answered, and the log stays short."""

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    words = [sys.executable, "-m", "testing.fake_server", "{}"]
    with (
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=few_files
        ) as process,
        ExitStack() as silent,
    ):
        assert process.stdout
        found = re.search(r"http://\S+:(\d+)", process.stdout.readline())
        assert found
        for _ in range(1000):
            connection = socket.create_connection(("127.0.0.1", int(found[1])), timeout=LONG_WAIT_S)
            silent.enter_context(connection).sendall(HALF_A_HEAD)
        for _ in range(20):
            assert httpx.get(f"{found[0]}/health", timeout=LONG_WAIT_S).status_code == 200
        process.terminate()
        _, log = process.communicate(timeout=LONG_WAIT_S)
        assert log.count("\n") <= 2, log[:2000]
