"""Running requests over HTTP: time limits, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Request
from testing.fakes import HOLD, FakeEngine, echo, piece

from mdi.core.config import GatewayConfig
from mdi.core.outputs import Piece
from mdi.gateway.app import create_app
from mdi.gateway.request_record import PLACE, RequestRecord
from mdi.gateway.streaming import events
from tests.gateway.conftest import CHAT, KEY, LONG_WAIT_S, REAL_KEY, FakeServer, RealServer, serving


def test_an_answer_past_the_time_limit_is_cancelled_and_reported() -> None:
    with serving(FakeEngine(), GatewayConfig(request_timeout_s=0.2)) as server:
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


def leave(server: FakeServer, *, stream: bool, after: bytes) -> None:
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
    server: FakeServer, caplog: pytest.LogCaptureFixture, stream: bool, steps: Any, after: bytes
) -> None:
    server.engine.says(*steps)
    leave(server, stream=stream, after=after)
    assert server.engine.requests[0].cancelled.wait(LONG_WAIT_S)
    server.engine.script = echo
    assert server.post("/generate", json={"prompt": "x"}).json() == {"samples": ["x #0"]}
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_finished_request_is_not_cancelled(server: FakeServer) -> None:
    assert server.post("/generate", json={"prompt": "x"}).status_code == 200
    assert server.events("/generate", prompt="x")[-1] == "[DONE]"
    assert not any(request.cancelled.is_set() for request in server.engine.requests)


def test_a_client_that_left_just_before_its_stream_began_cancels_it() -> None:
    engine = FakeEngine()
    engine.says(piece("first"), HOLD)

    app = create_app(engine)
    scope: Any = {"type": "http", "app": app, "path": "/generate", "method": "POST", "headers": [], "query_string": b""}
    scope[PLACE] = RequestRecord("id")

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


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(real: RealServer, stream: bool) -> None:
    body = json.dumps({"prompt": "Hi", "max_tokens": 450, "temperature": 0, "stream": stream}).encode()
    host, port = real.url.removeprefix("http://").split(":")
    for _ in range(6):  # more than there are slots
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {REAL_KEY}\r\nContent-Type: application/json\r\n"  # noqa: E501
            connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if stream:
                connection.recv(1)
    deadline = time.monotonic() + 5
    while real.engine._requests:
        assert time.monotonic() < deadline, "requests of clients that left are still running"
        time.sleep(0.01)
