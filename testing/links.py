"""Ends of links: servers that take a node's place, a client for one call, and a proxy that records what passes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from mdi.rpc import node_pb2
from mdi.rpc.callers import SERVICE, CallerCheck, caller_name
from mdi.rpc.channel import CHANNEL_OPTIONS, add_port, open_channel
from mdi.rpc.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import node_stub

PORTS = range(10_000, 32_000)  # below those that the system gives to connections
PACKET_BYTES = 1400
_numbers = itertools.count(os.getpid() * 997)  # test processes that run side by side begin at different ports


def free_port() -> int:
    """A port on which nothing listens, and which this process gets once."""
    while True:
        port = PORTS[next(_numbers) % len(PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def node_server(
    servicer: NodeServicer, identity: Identity | None, *, previous: str = "", port: int = 0
) -> Iterator[str]:
    """A node's server around any servicer; gives its address. previous: the node that may send it batches."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        server, bound = asyncio.run_coroutine_threadsafe(_start(servicer, identity, previous, port), loop).result()
        yield f"127.0.0.1:{bound}"
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(
    servicer: NodeServicer, identity: Identity | None, previous: str, port: int
) -> tuple[grpc.aio.Server, int]:
    options = [("grpc.so_reuseport", 0)]
    server = grpc.aio.server(interceptors=[CallerCheck(lambda: previous)] if identity else [], options=options)
    add_NodeServicer_to_server(servicer, server)
    bound = add_port(server, f"127.0.0.1:{port}", identity)
    await server.start()
    return server, bound


class StatusServicer(NodeServicer):
    """Answers Status alone, as node `name` does, and puts the name of the caller into `error`."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def Status(self, _request: object, context: Any) -> node_pb2.NodeStatus:  # noqa: N802 - the service's name
        role = "" if self._name.startswith("spare") else self._name
        return node_pb2.NodeStatus(
            node=self._name, role=role, state=node_pb2.NodeStatus.LOADED, error=caller_name(context) or ""
        )


def fake_node(identity: Identity | None, name: str = "finisher", port: int = 0) -> AbstractContextManager[str]:
    """A server that answers Status as node `name` does, and echoes the caller's name in `error`; gives its address."""
    return node_server(StatusServicer(name), identity, port=port)


def call_node(
    address: str, peer: str, identity: Identity | None, method: str = "Status", message: Message | None = None
) -> list[Message]:
    """What a method answers to one message, an empty one by default: of Watch, which does not end, the first message.

    Raises grpc.aio.AioRpcError.

    gRPC reports INTERNAL in place of the server's status when a call ends while its message is written: then it is
    called again.
    """

    async def run() -> list[Message]:
        described = SERVICE.methods_by_name[method]
        request = message or GetMessageClass(described.input_type)()
        async with open_channel(address, peer, identity, CHANNEL_OPTIONS) as channel:
            rpc = getattr(node_stub(channel), method)
            answer = rpc(iter([request]) if described.client_streaming else request, timeout=30)
            if method == "Watch":
                return [await anext(aiter(answer))]
            return [reply async for reply in answer] if described.server_streaming else [await answer]

    for _ in range(20):
        try:
            return asyncio.run(run())
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.INTERNAL:
                raise
    raise AssertionError(f"{method} failed 20 times inside gRPC")


def refused(address: str, peer: str, identity: Identity | None) -> grpc.StatusCode:
    """Why a node does not answer."""
    try:
        call_node(address, peer, identity)
    except grpc.aio.AioRpcError as error:
        return error.code()
    raise AssertionError(f"{peer} answered")


class RecordingProxy:
    """A TCP proxy on a free port of loopback that records every byte. address, port: where it listens.

    Like a router that forwards one port: at its host nothing else is reached, so all goes over gRPC.

    bytes_per_s: the rate at which it passes on what clients send, all connections together; None for no limit.
    """

    def __init__(self, target: str, bytes_per_s: float | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.2", 0))
        self.port = int(self._listener.getsockname()[1])
        self.address = f"127.0.0.2:{self.port}"
        self._lock = threading.Lock()
        self._slow = threading.Lock()  # held while the line to the node is in use
        self._flowing = threading.Event()
        self._flowing.set()
        self._streams: list[bytearray] = []
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def recorded(self) -> list[bytes]:
        """The bytes that passed, by connection and direction."""
        return [bytes(stream) for stream in self._streams]

    @property
    def passed_bytes(self) -> int:
        """The number of bytes that passed, in both directions together."""
        return sum(len(stream) for stream in self._streams)

    def swallow(self) -> None:
        """From now on nothing passes, in either direction, and no connection breaks."""
        self._flowing.clear()

    def cut(self) -> None:
        """Breaks every connection, and goes on accepting new ones."""
        with self._lock:
            _shut(*self._open)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self._flowing.set()
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
        n_bytes = min(65536, max(PACKET_BYTES, int((bytes_per_s or 1e9) / 50)))  # some 20 ms each

        def run() -> None:
            try:
                while data := source.recv(n_bytes):
                    if bytes_per_s:
                        with self._slow:
                            time.sleep(len(data) / bytes_per_s)
                    self._flowing.wait()
                    stream.extend(data)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)
            except OSError:  # a killed process resets its connections: the other end has to hear of it
                _shut(source, sink)

        self._streams.append(stream)
        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)


def _shut(*connections: socket.socket) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A TCP server that is no node: calls `answer` with each connection. Yields its address."""
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
