"""What a shutdown waits for, what it ends, and the exit status."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from testing.fakes import HOLD, FakeEngine, piece

from mdi.core.config import GatewayConfig
from mdi.gateway import server as gateway
from tests.field.test_strangers import HEAD, connect, wait_until
from tests.gateway.conftest import CHAT, LONG_WAIT_S, serving

PATIENT = GatewayConfig(drain_timeout_s=300)  # a test that waited for it would time out


def test_a_body_that_stops_half_way_does_not_hold_the_shutdown() -> None:
    """D7: the client is told, at once."""
    with serving(FakeEngine(), PATIENT) as server:
        sender = connect(server)
        sender.sendall(HEAD % 1000 + b'{"prompt": ')
        wait_until(lambda: server.http.server_state.tasks)
        server.http.should_exit = True
        answer = sender.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"shutting down" in answer
    sender.close()


def test_a_stream_that_nobody_reads_does_not_hold_the_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """D7: it is cut after some seconds without progress."""
    monkeypatch.setattr(gateway, "LAST_STALL_S", 0.3)
    with serving(FakeEngine(), PATIENT) as server:
        server.engine.says(*[piece("x" * 2**20)] * 64, HOLD)
        body = b'{"prompt": "x", "stream": true}'
        reader = connect(server)
        reader.sendall(HEAD % len(body) + body)
        wait_until(lambda: [each for each in server.http._connections if each.flow.write_paused])
    reader.close()


def test_a_stream_that_nobody_reads_fills_no_more_than_the_buffers() -> None:
    """D7: the server takes no further piece of a request while its client does not read."""
    with serving(FakeEngine(), PATIENT) as server:
        server.engine.says(*[piece("x" * 2**20)] * 64, HOLD)
        body = b'{"prompt": "x", "stream": true}'
        with connect(server) as reader:
            reader.sendall(HEAD % len(body) + body)
            wait_until(lambda: [each for each in server.http._connections if each.flow.write_paused])
            [connection] = server.http._connections
            assert connection.transport.get_write_buffer_size() < 4 * 2**20
            assert server.engine.requests[0].stream._items.qsize() > 32


def test_running_requests_end_before_the_server_does() -> None:
    """D7: a request that still runs is answered in full, whole or as a stream."""
    with serving(FakeEngine(), PATIENT) as server, ThreadPoolExecutor() as pool:
        server.engine.says(piece("so far"), HOLD, piece(", and on", "stop"))
        whole = pool.submit(server.post, "/v1/chat/completions", json=CHAT)
        stream = pool.submit(server.events, "/v1/chat/completions", **CHAT)
        wait_until(lambda: len(server.engine.requests) == 2)
        server.http.should_exit = True
        wait_until(lambda: not server.http.servers[0].is_serving())
        for request in server.engine.requests:
            request.resume()
        assert whole.result().json()["choices"][0]["message"]["content"] == "so far, and on"
        assert stream.result()[-1] == "[DONE]"


def test_requests_that_take_longer_than_the_drain_end_with_an_error() -> None:
    """D8: a stream's last event says why; a whole answer has a status."""
    with serving(FakeEngine(), GatewayConfig(drain_timeout_s=0.3)) as server, ThreadPoolExecutor() as pool:
        server.engine.says(piece("so far"), HOLD)
        whole = pool.submit(server.post, "/v1/chat/completions", json=CHAT)
        stream = pool.submit(server.events, "/v1/chat/completions", **CHAT)
        wait_until(lambda: len(server.engine.requests) == 2)
        server.http.should_exit = True
        assert whole.result().status_code == 503
        *_, said, last = stream.result()
        assert said["choices"][0]["delta"]["content"] == "so far"
        assert "shutting down" in last["error"]["message"]
        assert all(request.cancelled.wait(LONG_WAIT_S) for request in server.engine.requests)


@contextmanager
def process(**settings: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a process, and its URL. Its answers never end."""
    words = [sys.executable, "-m", "testing.fake_server", json.dumps(settings)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout
            found = re.search(r"http://\S+", started.stdout.readline())
            assert found
            yield started, found[0]
        finally:
            started.kill()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_exit_status_is_0_after_a_drain(sent: signal.Signals) -> None:
    """D10: also when a request had to be ended."""
    with (
        process(drain_timeout_s=0.5) as (server, url),
        httpx.stream("POST", f"{url}/generate", json={"prompt": "x", "stream": True}, timeout=LONG_WAIT_S) as stream,
    ):
        lines = stream.iter_lines()
        assert "so far" in next(lines)
        server.send_signal(sent)
        assert "shutting down" in list(lines)[-2]
        assert server.wait(LONG_WAIT_S) == 0


@pytest.mark.slow
def test_a_second_signal_ends_the_server_at_once() -> None:
    """D10: whatever still runs."""
    with (
        process(drain_timeout_s=300) as (server, url),
        httpx.stream("POST", f"{url}/generate", json={"prompt": "x", "stream": True}, timeout=LONG_WAIT_S) as stream,
    ):
        lines = stream.iter_lines()  # kept: the connection closes with it
        assert "so far" in next(lines)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(LONG_WAIT_S) == -signal.SIGTERM
