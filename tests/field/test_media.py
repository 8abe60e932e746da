"""Media as they come from outside: slow hosts, long films, clients that leave, odd files. Others are not delayed."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from testing.videos import encoded, endless, numbered
from testing.waiting import wait_for
from torch import Tensor

from mdi import Engine, SamplingParams
from mdi.bench.scenario import noise
from mdi.cluster.remote_encoder import Encoded
from mdi.core.config import GatewayConfig
from mdi.core.cores import usable_cores
from mdi.core.errors import ClosedError, InputError, LinkError, MediaError, OverloadedError
from mdi.engine import Stream
from mdi.layers.rope import Grid
from mdi.media import MediaPolicy
from mdi.media.video_file import VideoFile
from tests.gateway.conftest import serving

GREEDY = SamplingParams(temperature=0, max_tokens=4)
N_FRAMES = 50_000
POLICY = MediaPolicy(private_hosts=True, fetch_timeout_s=60)


class HangingHost:
    """A host that sends the head of an answer, and then nothing."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/picture.png"
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def left(self) -> int:
        """Connections that the other side has closed."""
        return sum(_is_closed(connection) for connection in self.connections)

    def close(self) -> None:
        self._listener.close()
        for connection in self.connections:
            connection.close()

    def _accept(self) -> None:
        try:
            while True:
                connection, _ = self._listener.accept()
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                self.connections.append(connection)
        except OSError:
            pass


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


class FrameCount:
    """Counts the packets that are read of all films; `hold` stops every film after so many, until `resume`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = 0
        self.films: set[int] = set()
        self.hold = 0
        self.resume = threading.Event()
        original = VideoFile._packets

        def counted(file: VideoFile, stream: Any) -> Iterator[Any]:
            self.films.add(id(file))
            for number, packet in enumerate(original(file, stream)):
                if self.hold and number >= self.hold:
                    self.resume.wait(60)
                self.read += 1
                yield packet

        monkeypatch.setattr(VideoFile, "_packets", counted)


@pytest.fixture
def host() -> Iterator[HangingHost]:
    host = HangingHost()
    yield host
    host.close()


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> FrameCount:
    return FrameCount(monkeypatch)


@pytest.fixture(scope="module")
def film() -> bytes:
    return endless(N_FRAMES)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine(tiny_checkpoint, sequence_length=512, max_sequences=4, media=POLICY) as engine:
        yield engine


def showing(kind: str, source: Any, **settings: Any) -> list[dict[str, Any]]:
    content = [{"type": kind, kind: source, **settings}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]


def about_film(film: bytes) -> list[dict[str, Any]]:
    return showing("video", film, nframes=4)


def running(engine: Engine, streams: list[Stream]) -> int:
    """How many of the streams have not ended, nor begun."""
    return sum(stream._items.empty() for stream in streams)


def end(streams: list[Stream]) -> None:
    for stream in streams:
        stream.cancel()
    for stream in streams:
        assert list(stream) == []


# Slow hosts


def test_text_and_pictures_are_answered_while_a_hundred_hosts_send_nothing(
    engine: Engine, host: HangingHost, photograph: bytes
) -> None:
    """D4: downloads wait beside each other, and nobody else waits for them."""
    slow = [engine.submit(showing("image", host.url), GREEDY) for _ in range(100)]
    wait_for(lambda: len(host.connections) == 100)
    assert engine.chat("Hello", GREEDY).token_ids
    assert engine.chat(showing("image", photograph), GREEDY).token_ids
    assert running(engine, slow) == 100
    end(slow)


def test_a_download_ends_soon_when_its_client_leaves(engine: Engine, host: HangingHost) -> None:
    """D4: the connection is closed long before the download's time limit, and the request leaves the queue."""
    slow = [engine.submit(showing("image", host.url), GREEDY) for _ in range(20)]
    wait_for(lambda: len(host.connections) == 20)
    end(slow)
    assert not engine._requests
    wait_for(lambda: host.left() == 20)


def test_clients_that_leave_over_http_leave_no_work_behind(engine: Engine, host: HangingHost) -> None:
    """D4: as above, with clients that close their connection."""
    url = {"type": "image_url", "image_url": {"url": host.url}}
    with serving(engine, GatewayConfig()) as server:
        body = {"model": engine.model_name, "messages": [{"role": "user", "content": [url]}]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/chat/completions", json=body, timeout=1)
        wait_for(lambda: host.left() == 1)
        wait_for(lambda: not engine._requests)


def test_a_request_counts_in_the_queue_until_its_preparation_has_ended(
    tiny_checkpoint: Path, host: HangingHost
) -> None:
    """B3: who sends and leaves, again and again, does not have more work running than the queue allows."""
    with Engine(tiny_checkpoint, sequence_length=256, max_queue=2, media=POLICY) as engine:
        slow = [engine.submit(showing("image", host.url), GREEDY) for _ in range(2)]
        with pytest.raises(OverloadedError):
            engine.submit("Hello", GREEDY)
        end(slow)
        assert engine.chat("Hello", GREEDY).token_ids


def test_closing_does_not_wait_for_downloads(tiny_checkpoint: Path, host: HangingHost) -> None:
    """D4: what still downloads at the end fails as everything else does."""
    with Engine(tiny_checkpoint, sequence_length=256, media=POLICY) as engine:
        stream = engine.submit(showing("image", host.url), GREEDY)
        wait_for(lambda: host.connections)
    with pytest.raises(ClosedError):
        list(stream)


# Long films


def test_text_is_answered_while_films_are_decoded(engine: Engine, film: bytes, frames: FrameCount) -> None:
    """B2: however many films are being read."""
    frames.hold = 100
    films = [engine.submit(about_film(film), GREEDY) for _ in range(2 * usable_cores())]
    wait_for(lambda: frames.read >= 100)
    assert engine.chat("Hello", GREEDY).token_ids
    assert running(engine, films) == len(films)
    for stream in films:
        stream.cancel()
    frames.resume.set()
    end(films)


def test_a_picture_does_not_wait_until_long_films_are_decoded(
    engine: Engine, film: bytes, frames: FrameCount, photograph: bytes
) -> None:
    """B2: films take turns with what else is to be decoded."""
    films = [engine.submit(about_film(film), GREEDY) for _ in range(2 * usable_cores())]
    wait_for(lambda: len(frames.films) == len(films))
    assert engine.chat(showing("image", photograph), GREEDY).token_ids
    assert running(engine, films) == len(films)
    end(films)


def test_a_film_is_not_decoded_for_a_client_that_has_left(engine: Engine, film: bytes, frames: FrameCount) -> None:
    """B3: neither to its end nor, if it has not begun, at all."""
    films = [engine.submit(about_film(film), GREEDY) for _ in range(8)]
    wait_for(lambda: frames.read > 10)
    end(films)
    assert frames.read < N_FRAMES
    assert not engine._requests
    assert engine._preparation._memory.held_bytes == 0


def test_all_ends_and_all_memory_is_released_however_little_there_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B2: many large requests share a small memory, and some leave; nobody waits for ever."""
    chance = random.Random(0)
    memory = engine._preparation._memory
    monkeypatch.setattr(memory, "_limit_bytes", 300_000)
    film = encoded(numbered(6))
    streams = []
    for number in range(30):
        pictures = [noise(chance.choice((28, 84, 140)), np.random.default_rng((number, i))) for i in range(2)]
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
        content.append({"type": "video", "video": film, "nframes": 4, "max_pixels": 3136, "min_pixels": 784})
        chance.shuffle(content)
        streams.append(engine.submit([{"role": "user", "content": content}], SamplingParams(max_tokens=1)))
        if chance.random() < 0.3:
            streams.pop().cancel()
    for stream in streams:
        assert stream.completion().token_ids
    wait_for(lambda: not engine._requests)
    assert memory.held_bytes == 0
    assert engine._preparation._turns._free == usable_cores()


# The vision node is away


class AwayEncoder:
    """A vision node that takes an image and gives no answer until it is told to fail."""

    def __init__(self) -> None:
        self.asked: list[Callable[[Encoded], None]] = []

    def encode(self, rows: Tensor, grid: Grid, arrived_s: float, done: Callable[[Encoded], None]) -> Future[Encoded]:
        self.asked.append(done)
        return Future()


def test_pictures_that_wait_for_the_vision_node_stop_no_text(
    engine: Engine, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3: as many as there are slots, and more: they wait outside the slots. Known pictures do not wait at all."""
    known = engine.chat(showing("image", photograph), GREEDY)
    away = AwayEncoder()
    monkeypatch.setattr(engine._loop._vision, "_remote", away)
    pictures = [engine.submit(showing("image", photograph, max_pixels=784 * n), GREEDY) for n in range(4, 24)]
    wait_for(lambda: away.asked)
    assert engine.chat("Hello", GREEDY).token_ids
    assert engine.chat(showing("image", photograph), GREEDY).token_ids == known.token_ids
    assert running(engine, pictures) == 20
    for _ in pictures:
        wait_for(lambda: away.asked)
        away.asked.pop()(LinkError("the vision node is away", "vision"))
    for stream in pictures:
        with pytest.raises(LinkError, match="vision node"):
            list(stream)


# Sizes that are refused before anything is parsed


def test_more_media_than_a_request_may_have_are_refused_at_once(engine: Engine, host: HangingHost) -> None:
    """B2: nothing is downloaded."""
    images = [{"type": "image", "image": host.url}] * 257
    with pytest.raises(InputError, match="may have 256 images and videos, and this one has 257: send fewer"):
        engine.submit([{"role": "user", "content": images}])
    assert not host.connections


def test_more_frames_than_a_video_may_have_are_refused_at_once(engine: Engine, host: HangingHost) -> None:
    """B2: a list of frames is counted before its first one is fetched."""
    with pytest.raises(MediaError, match="1 to 768 frames, and this one has 769"):
        engine.submit(showing("video", [host.url] * 769))
    assert not host.connections
