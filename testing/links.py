"""Small ends of links for tests: a server that answers as a node does, and a proxy that remembers what passes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from mdi.node.server import CALLERS
from mdi.rpc import codec, node_pb2
from mdi.rpc.channel import CHANNEL_OPTIONS, CallerCheck, add_port, open_channel, peer_name
from mdi.rpc.tls import Identity


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def answering(identity: Identity | None, name: str = "finisher", port: int = 0) -> Iterator[str]:
    """A server that answers Status as node `name` does, and echoes who calls in `error`; gives its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        server, bound = asyncio.run_coroutine_threadsafe(_start(identity, name, port), loop).result()
        yield f"127.0.0.1:{bound}"
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(identity: Identity | None, name: str, port: int) -> tuple[grpc.aio.Server, int]:
    async def status(_request: object, context: Any) -> node_pb2.NodeStatus:
        spare = name if name.startswith("spare") else ""
        return node_pb2.NodeStatus(
            name=name, state=node_pb2.NodeStatus.LOADED, error=peer_name(context) or "", spare=spare
        )

    async def batches(pieces: AsyncIterator[object], _context: object) -> node_pb2.BatchesReply:
        async for _ in pieces:
            pass
        return node_pb2.BatchesReply()

    async def results(_request: object, _context: object) -> AsyncIterator[node_pb2.BatchResult]:
        yield node_pb2.BatchResult(batch_id=5)

    handlers = {
        "Status": grpc.unary_unary_rpc_method_handler(status, None, codec.serialize),
        "Batches": grpc.stream_unary_rpc_method_handler(batches, None, codec.serialize),
        "Results": grpc.unary_stream_rpc_method_handler(results, None, codec.serialize),
    }
    options = [("grpc.so_reuseport", 0)]
    server = grpc.aio.server(interceptors=[CallerCheck(CALLERS)] if identity else [], options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(codec.SERVICE, handlers),))
    bound = add_port(server, f"127.0.0.1:{port}", identity)
    await server.start()
    return server, bound


def call(address: str, peer: str, identity: Identity | None, method: str = "Status") -> bytes:
    """Calls a method of `answering`. Raises grpc.aio.AioRpcError."""

    async def run() -> bytes:
        channel = open_channel(address, peer, identity, CHANNEL_OPTIONS)
        try:
            if method == "Results":
                return b"".join([data async for data in channel.unary_stream(codec.method(method))(b"", timeout=10)])
            if method in ("Batches", "Weights"):
                return bytes(await channel.stream_unary(codec.method(method))(iter([b""]), timeout=10))
            return bytes(await channel.unary_unary(codec.method(method))(b"", timeout=10))
        finally:
            await channel.close()

    return asyncio.run(run())


class Recorder:
    """A TCP proxy on a free port of loopback that remembers every byte. address: where it listens.

    bytes_per_s: how fast it passes on what clients send; None is at once.
    """

    def __init__(self, target: str, bytes_per_s: float | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._streams: list[bytearray] = []
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def recorded(self) -> list[bytes]:
        """What passed, per connection and direction."""
        return [bytes(stream) for stream in self._streams]

    @property
    def passed_bytes(self) -> int:
        """How much passed, in both directions."""
        return sum(len(stream) for stream in self._streams)

    def cut(self) -> None:
        """Breaks every connection; new ones are taken."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self.cut()
        for thread in self._threads[1:]:
            thread.join()
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open += [client, server]
            self._copy(client, server, self._bytes_per_s)
            self._copy(server, client, None)

    def _copy(self, source: socket.socket, sink: socket.socket, bytes_per_s: float | None) -> None:
        stream = bytearray()

        def run() -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    stream.extend(data)
                    if bytes_per_s:
                        time.sleep(len(data) / bytes_per_s)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

        self._streams.append(stream)
        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)


@contextmanager
def speaking(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that is no node: does with each connection what it is told. Gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                answer(connection)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
