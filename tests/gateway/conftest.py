"""What the gateway's tests share: servers on loopback, in front of a scripted engine or of a real one."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx
import openai
import pytest
from testing.fakes import FakeEngine
from testing.videos import encoded, numbered

from mdi import Engine
from mdi.core.config import GatewayConfig
from mdi.gateway import server as gateway
from mdi.gateway.app import create_app
from mdi.media import MediaPolicy

KEY = "schlüssel"
REAL_KEY = "secret-key"  # the `openai` client can send ASCII only
HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT: dict[str, Any] = {"model": "fake", "messages": HELLO}
LONG_WAIT_S = 20.0

E = TypeVar("E", FakeEngine, Engine)


@dataclass(frozen=True)
class Server(Generic[E]):
    """A server on loopback, and ways to ask it. Without `verify=False`, every request loads all certificates: 40 ms."""

    url: str
    engine: E
    key: str
    http: gateway.Server

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def headers(self) -> httpx.Headers:
        return httpx.Headers({b"Authorization": b"Bearer " + self.key.encode()})

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=LONG_WAIT_S, verify=False)

    def post(self, path: str, **request: Any) -> httpx.Response:
        headers = self.headers
        headers.update(request.pop("headers", None))
        return httpx.post(self.url + path, headers=headers, timeout=60, verify=False, **request)

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream, parsed; [DONE] as it is. Comments, which a slow machine may bring, are left out."""
        answer = self.post(path, json={**body, "stream": True})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.text.strip().split("\n\n") if line[0] != ":"]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def named_events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream whose events have the names of their types."""
        answer = self.post(path, json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        events = []
        for event in answer.text.strip().split("\n\n"):
            if event[0] != ":":
                name, data = event.split("\n")
                events.append(json.loads(data.removeprefix("data: ")))
                assert name == f"event: {events[-1]['type']}"
        return events


FakeServer = Server[FakeEngine]
RealServer = Server[Engine]


@contextmanager
def serving(engine: E, config: GatewayConfig | None = None, port: int = 0) -> Iterator[Server[E]]:
    """port: 0 takes a free one."""
    config = config or GatewayConfig()
    server = gateway.Server(create_app(engine, config), config)
    bound = gateway.bind("127.0.0.1", port)
    port = bound.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Server(f"http://127.0.0.1:{port}", engine, config.api_keys[0] if config.api_keys else "any", server)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="package")
def shared() -> Iterator[FakeServer]:
    config = GatewayConfig(api_keys=(KEY,), max_body_bytes=8 * 2**20, served_model_name=("fake", "gpt-4o", "org/name"))
    with serving(FakeEngine(), config) as server:
        yield server


@pytest.fixture
def server(shared: FakeServer) -> FakeServer:
    """Serves a scripted engine, with a key and several names."""
    shared.engine.reset()
    return shared


@pytest.fixture(scope="package")
def shared_open() -> Iterator[FakeServer]:
    with serving(FakeEngine()) as server:
        yield server


@pytest.fixture
def open_server(shared_open: FakeServer) -> FakeServer:
    """Serves a scripted engine without a key, for the `openai` client."""
    shared_open.engine.reset()
    return shared_open


@pytest.fixture
def client(open_server: FakeServer) -> Iterator[openai.OpenAI]:
    with open_server.client as client:
        yield client


@pytest.fixture(scope="package")
def real(tiny_checkpoint: Path) -> Iterator[RealServer]:
    """Serves a tiny model, with a key."""
    config = GatewayConfig(api_keys=(REAL_KEY,), max_body_bytes=2 * 2**20)
    with Engine(tiny_checkpoint, sequence_length=512, max_sequences=4, media=MediaPolicy(remote=False)) as engine:  # noqa: SIM117
        with serving(engine, config) as server:
            yield server


@pytest.fixture
def picture(photograph: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(photograph).decode()


@pytest.fixture(scope="package")
def clip() -> bytes:
    return encoded(numbered(30), fps=10)


def data_url(content: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(content).decode()


def video_chat(video: Any, **settings: Any) -> Any:
    part = {"type": "video"} | ({"video": video} if video else {}) | settings
    return [{"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}]


def with_part(part: dict[str, Any]) -> dict[str, Any]:
    """A chat of one part."""
    return {**CHAT, "messages": [{"role": "user", "content": [part]}]}


def image_chat(image: str | None) -> Any:
    part = {"type": "image"} | ({"image": image} if image else {})
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
