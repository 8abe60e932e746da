"""What the HTTP server costs in front of a stub engine: CPU of many streams, and what other clients do to their pace.

    python -m benchmarks.gateway                  # 256 streams of 20 tokens/s, a minute in all
    python -m benchmarks.gateway --short          # the same with 16 streams, in seconds
    python -m benchmarks.gateway --profile FILE   # and the server's profile, for pstats

The server is a process of its own, and so is its engine's thread in it: every 50 ms it gives each stream a token. The
clients are sockets of this process. A pause is the longest time in which a running stream got nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from testing.fakes import FakeEngine

from mdi.cli.parent import end_with_parent
from mdi.core.batch import Token
from mdi.core.config import GatewayConfig
from mdi.core.messages import Conversation, PromptInput, parse_messages
from mdi.core.outputs import Piece
from mdi.core.sampling import SamplingParams
from mdi.engine import Stream
from mdi.gateway.server import bind, serve

TICK_S = 0.05
FLOOD = "flood"  # the message of clients that want more than they read
FLOOD_PIECE = Piece(0, "x" * 100, (Token(1, 0.0),))
PIECE = Piece(0, " token", (Token(1, 0.0),))
SLOW_BYTES = 4096  # a second, of a slow reader
BODY_MB = 60
console = Console()


@dataclass(frozen=True)
class Sizes:
    """How many clients of each kind there are, and for how long each figure is taken."""

    streams: int = 256
    idle: int = 500
    slow: int = 50
    seconds: float = 10.0


class PacedEngine(FakeEngine):
    """Gives every stream a token each TICK_S, in one thread, as an engine's steps do; ten large ones to a flood."""

    def __init__(self) -> None:
        super().__init__()
        self._running: dict[int, tuple[Stream, list[Piece]]] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, prompt: PromptInput, params: SamplingParams | None = None, **_: Any) -> Stream:
        stream = Stream(lambda: self._end(id(stream)))
        stream.prompt_token_ids = tuple(range(7))
        flood = isinstance(prompt, Conversation) and _text(prompt) == FLOOD
        self._running[id(stream)] = stream, [FLOOD_PIECE] * 10 if flood else [PIECE]
        return stream

    def _end(self, number: int) -> None:
        if found := self._running.pop(number, None):
            found[0].put(None)

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            for stream, pieces in list(self._running.values()):
                for piece in pieces:
                    stream.put(piece)
            due = max(due + TICK_S, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))


def _text(conversation: Conversation) -> str:
    [message] = parse_messages(conversation.messages)
    return message.content if isinstance(message.content, str) else ""


class Reader(asyncio.Protocol):
    """One stream: counts its events and notes its longest pause."""

    def __init__(self, content: str, *, slow: bool = False) -> None:
        self._request = _request({"model": "fake", "messages": [{"role": "user", "content": content}], "stream": True})
        self._slow = slow
        self.events = 0
        self.reset()

    def reset(self) -> None:
        self.pause_s, self._last_s = 0.0, time.perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        self.pause_s, self._last_s = max(self.pause_s, now_s - self._last_s), now_s
        self.events += data.count(b"data: {")
        if self._slow:
            self.transport.max_size = SLOW_BYTES  # type: ignore[attr-defined]  # of one read
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(1.0, self.resume)

    def resume(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()


def large_request(megabytes: int) -> bytes:
    """A chat with one data: URL, which the server has to parse."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (megabytes * 10**6)}}
    return _request({"model": "fake", "messages": [{"role": "user", "content": [image]}], "stream": True})


def _request(body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


@dataclass(frozen=True)
class Load:
    """What a time with streams took. cores: of the server's process. busiest: of its busiest thread."""

    cores: float
    busiest: float
    events_per_s: float
    pause_s: float
    resident_mb: float


@dataclass
class Server:
    """A server's process, and the streams that are read from it."""

    process: psutil.Process
    port: int

    async def connect(self, make: Any) -> Any:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(make, "127.0.0.1", self.port))[1]

    async def streams(self, count: int) -> list[Reader]:
        readers = [await self.connect(lambda: Reader("go")) for _ in range(count)]
        while not all(reader.events > 1 for reader in readers):
            await asyncio.sleep(TICK_S)
        return readers

    async def load(self, readers: list[Reader], seconds: float, beside: Any = None) -> Load:
        """What the streams take for a time, in which `beside` is awaited."""
        events, before, started_s = self._events(readers), self._cpu_s(), time.perf_counter()
        for reader in readers:
            reader.reset()
        if beside is not None:
            await beside
        await asyncio.sleep(max(0.0, seconds - (time.perf_counter() - started_s)))
        took_s, after = time.perf_counter() - started_s, self._cpu_s()
        spent = {thread: after[thread] - before.get(thread, 0.0) for thread in after}
        return Load(
            sum(spent.values()) / took_s,
            max(spent.values()) / took_s,
            (self._events(readers) - events) / took_s,
            max(reader.pause_s for reader in readers),
            self.process.memory_info().rss / 1e6,
        )

    def _events(self, readers: list[Reader]) -> int:
        return sum(reader.events for reader in readers)

    def _cpu_s(self) -> dict[int, float]:
        return {thread.id: thread.user_time + thread.system_time for thread in self.process.threads()}

    def send_body(self, request: bytes) -> None:
        """Sends a request, and waits for the beginning of its answer. For a thread: it holds no lock meanwhile."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(request)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


@contextmanager
def server(profile: str | None) -> Iterator[Server]:
    command = [sys.executable, "-m", "benchmarks.gateway", "--serve", *(("--profile", profile) if profile else ())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield Server(psutil.Process(process.pid), int(process.stdout.readline().rsplit(":", 1)[1]))
        finally:
            process.terminate()
            process.wait()


def run_server(profile: str | None) -> None:
    end_with_parent()
    profiler = cProfile.Profile() if profile else None
    if profiler:
        profiler.enable()
    serve(PacedEngine(), bind("127.0.0.1", 0), GatewayConfig(max_connections=4096, drain_timeout_s=0))
    if profiler and profile:
        profiler.disable()
        profiler.dump_stats(profile)


async def measure(served: Server, sizes: Sizes) -> None:
    table = Table("", "cores of the server", "its busiest thread", "events/s", "longest pause", "memory")

    def show(name: str, load: Load) -> None:
        figures = (
            f"{load.cores:.2f}",
            f"{load.busiest:.2f}",
            f"{load.events_per_s:.0f}",
            f"{load.pause_s * 1000:.0f} ms",
        )
        table.add_row(name, *figures, f"{load.resident_mb:.0f} MB")

    readers = await served.streams(sizes.streams)
    alone = await served.load(readers, sizes.seconds)
    show(f"{sizes.streams} streams", alone)
    sending = asyncio.to_thread(served.send_body, large_request(BODY_MB))
    show(f"and a body of {BODY_MB} MB", await served.load(readers, sizes.seconds / 2, sending))
    idle = [await served.connect(asyncio.Protocol) for _ in range(sizes.idle)]
    slow = [await served.connect(lambda: Reader(FLOOD, slow=True)) for _ in range(sizes.slow)]
    crowded = await served.load(readers, sizes.seconds)
    show(f"and {len(idle)} idle connections, {len(slow)} slow readers", crowded)
    console.print(table)
    per_event = alone.cores / alone.events_per_s * 1e6
    in_time = alone.events_per_s * TICK_S / sizes.streams
    console.print(f"{per_event:.0f} us of CPU an event; {in_time:.1%} of the events came in time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=Sizes.streams)
    parser.add_argument("--seconds", type=float, default=Sizes.seconds, help="for which each figure is taken")
    parser.add_argument("--short", action="store_true", help="few streams, for seconds")
    parser.add_argument("--profile", help="file for the server's profile")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        run_server(given.profile)
        return
    sizes = (
        Sizes(streams=16, idle=20, slow=4, seconds=1.0) if given.short else Sizes(given.streams, seconds=given.seconds)
    )
    with server(given.profile) as served, suppress(KeyboardInterrupt):
        asyncio.run(measure(served, sizes))


if __name__ == "__main__":
    main()
