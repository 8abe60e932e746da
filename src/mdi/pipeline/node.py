"""The server around one stage: batches in, activations or results out. The same for every node but the starter.

asyncio owns the sockets, one thread computes; while a batch is computed, the next is received and the one before sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from pathlib import Path

import grpc
import psutil
import torch
from google.protobuf.message import Message
from torch import Tensor

from mdi.checkpoint.load import LoadedStage, load_chunk
from mdi.checkpoint.manifest import Manifest
from mdi.errors import CheckpointError, ConfigError, LinkError, MDIError
from mdi.model.batch import Batch
from mdi.pipeline import wire, wire_pb2
from mdi.pipeline.link import Result
from mdi.pipeline.reach import why_unreachable
from mdi.pipeline.stage import Stage
from mdi.pipeline.tls import VARIABLE, CallerCheck, Identity, add_port, open_channel

log = logging.getLogger(__name__)

Work = tuple[Batch, Tensor] | wire_pb2.Failure
Outgoing = wire_pb2.Piece | wire_pb2.Result
State = wire_pb2.NodeStatus
CALLERS = {  # nodes that a method is for, by the beginnings of their names
    wire.method("Configure"): ("starter",),
    wire.method("Status"): ("starter",),
    wire.method("Results"): ("starter",),
    wire.method("Batches"): ("starter", "secondary"),
}


def serve_node(
    chunk: Path,
    *,
    listen: str,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    with_parent: bool = False,
    insecure: bool = False,
    identity: Identity | None = None,
) -> None:
    """Serves a chunk's stage until told to stop (SIGTERM, SIGINT).

    listen: host:port; port 0 picks a free one. One line of JSON on standard output names the port before the chunk is
    loaded, so that progress can be asked for. with_parent: end as soon as standard input does, which the parent holds.
    identity: links are encrypted, and only nodes with a certificate of the same authority may call; None: in the clear.
    A chunk that cannot be loaded is told to the parent through Status, and raised as CheckpointError without one.
    Raises ConfigError when the address cannot be bound, or must not be without `insecure`.
    """
    if threads:
        torch.set_num_threads(threads)
    if with_parent:
        threading.Thread(target=_end_with_standard_input, daemon=True).start()
    node = Node(chunk, device=device, dtype=dtype, identity=identity)
    asyncio.run(_serve(node, listen, insecure, identity, stop_if_failed=not with_parent))
    if node.error and not with_parent:
        raise CheckpointError(node.error)


async def _serve(node: Node, listen: str, insecure: bool, identity: Identity | None, stop_if_failed: bool) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    options = (*wire.CHANNEL_OPTIONS, *wire.SERVER_OPTIONS, ("grpc.so_reuseport", 0))
    server = grpc.aio.server(options=options, interceptors=[CallerCheck(CALLERS)] if identity else [])
    server.add_generic_rpc_handlers((node.handlers(),))
    port = _bind(server, listen, insecure, identity)
    await server.start()
    print(json.dumps({"port": port}), flush=True)  # noqa: T201 - what the launcher waits for
    if stop_if_failed:
        safety = "encrypted" if identity else "not encrypted"
        print(f"node {node.name} listens at {listen.rpartition(':')[0]}:{port}, {safety}", file=sys.stderr)  # noqa: T201
    node.start(stop.set if stop_if_failed else lambda: None)
    await stop.wait()
    await server.stop(grace=0.2)
    await node.stop()


def _bind(server: grpc.aio.Server, listen: str, insecure: bool, identity: Identity | None) -> int:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{listen!r} is no address to listen at: write host:port")
    if identity is None and not insecure and not is_loopback(host):
        raise ConfigError(
            f"links are not encrypted, so only loopback may be bound, not {host}: "
            f"set {VARIABLE}=1 (see `mdi certs --help`), or allow it with --insecure"
        )
    try:
        return add_port(server, listen, identity)
    except RuntimeError:
        raise ConfigError(
            f"port {port} on {host} cannot be bound: is it in use, or {host} another machine's address? "
            "Choose another, or port 0 for a free one"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is of this machine alone. Raises ConfigError when it is not known."""
    try:
        return all(ip_address(info[4][0]).is_loopback for info in socket.getaddrinfo(host.strip("[]"), None))
    except (OSError, ValueError):
        raise ConfigError(f"the host {host!r} is not known here") from None


def _end_with_standard_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # a node holds nothing worth saving, and its parent is gone


class Wiring:
    """One epoch of a node: its stage, what waits to be sent, and the stream to the next node if there is one.

    A batch belongs to the wiring it arrived in: once that is replaced, what it still computes goes nowhere.
    """

    def __init__(self, epoch: int, stage: Stage) -> None:
        self.epoch = epoch
        self.stage = stage
        self.out: asyncio.Queue[Outgoing | None] = asyncio.Queue()
        self.next_lost = False
        self.next_error = ""
        self._closing = False
        self._channel: grpc.aio.Channel | None = None
        self._sender: asyncio.Task[None] | None = None
        self._explaining: asyncio.Task[None] | None = None

    def open(self, next_address: str, next_name: str, identity: Identity | None, traffic: wire.Traffic) -> None:
        """Begins to send what is put into `out` to the next node."""
        options = (*wire.CHANNEL_OPTIONS, *wire.KEEPALIVE_OPTIONS)
        self._next = next_address, next_name, identity
        self._channel = open_channel(*self._next, options)
        send = self._channel.stream_unary(wire.method("Batches"), request_serializer=traffic.serialize)
        self._sender = asyncio.create_task(self._send(send()))

    async def close(self) -> None:
        """Ends the stream, or whoever reads `out`."""
        self._closing = True
        self.out.put_nowait(None)
        if self._sender and self._channel:
            self._sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sender
            await self._channel.close()

    async def _send(self, call: grpc.aio.StreamUnaryCall) -> None:
        call.add_done_callback(self._lose_next)  # an idle stream of writes alone would not notice
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while (message := await self.out.get()) is not None:
                await call.write(message)

    def _lose_next(self, _call: object) -> None:
        self.next_lost = True
        if not self._closing:
            self._explaining = asyncio.create_task(self._explain())

    async def _explain(self) -> None:
        reason = await asyncio.to_thread(why_unreachable, *self._next)
        self.next_error = reason or ""
        address, name, _ = self._next
        log.error("the link to node %s at %s broke: %s", name, address, reason or "it is there, though")


class Node:
    """One chunk's stage behind the gRPC service of wire.proto."""

    def __init__(self, chunk: Path, *, device: str, dtype: str | None, identity: Identity | None = None) -> None:
        self._chunk = chunk
        self._device = device
        self._dtype = dtype
        self._identity = identity
        self.name = chunk.stem.removeprefix("model_")
        self._manifest_digest = ""
        self._loaded: LoadedStage | None = None
        self.error = ""
        self._progress = (0, 0)
        self._traffic = wire.Traffic()
        self._wiring: Wiring | None = None
        self._work: queue.SimpleQueue[tuple[Wiring, Work] | None] = queue.SimpleQueue()

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service's methods."""

        def parser(kind: type[Message]) -> wire.Parser:
            return lambda data: wire.parse(kind, data)

        return grpc.method_handlers_generic_handler(
            wire.SERVICE,
            {
                "Configure": grpc.unary_unary_rpc_method_handler(
                    self._configure, parser(wire_pb2.Configuration), wire.serialize
                ),
                "Status": grpc.unary_unary_rpc_method_handler(
                    self._status, parser(wire_pb2.StatusRequest), wire.serialize
                ),
                "Batches": grpc.stream_unary_rpc_method_handler(
                    self._batches, self._traffic.parser(wire_pb2.Piece), wire.serialize
                ),
                "Results": grpc.unary_stream_rpc_method_handler(
                    self._results, parser(wire_pb2.ResultsRequest), self._traffic.serialize
                ),
            },
        )

    def start(self, failed: Callable[[], None]) -> None:
        """Begins to load, and to compute what arrives. failed: called in the event loop when the chunk is no good."""
        self._asyncio = asyncio.get_running_loop()
        threading.Thread(target=self._load, args=(failed,), name="mdi-load", daemon=True).start()
        threading.Thread(target=self._compute, name="mdi-compute", daemon=True).start()

    async def stop(self) -> None:
        """Ends the sending side."""
        self._work.put(None)
        await self._unwire()

    def _load(self, failed: Callable[[], None]) -> None:
        def note(done: int, total: int) -> None:
            self._progress = (done, total)

        try:
            loaded = load_chunk(self._chunk, device=self._device, dtype=self._dtype, progress=note)
            self._manifest_digest = Manifest.read(self._chunk.parent).digest
            self._loaded = loaded
        except MDIError as error:
            self.error = str(error)
        except Exception:
            log.exception("the chunk could not be loaded")
            self.error = "the chunk could not be loaded; this node's log has the details"
        if self.error:
            self._asyncio.call_soon_threadsafe(failed)

    async def _status(self, _request: wire_pb2.StatusRequest, _context: object) -> wire_pb2.NodeStatus:
        done, total = self._progress
        status = State(
            state=State.FAILED if self.error else State.LOADED if self._loaded else State.LOADING,
            error=self.error,
            done_bytes=done,
            total_bytes=total,
            name=self.name,
            device=self._device,
            resident_bytes=psutil.Process().memory_info().rss,
            pid=os.getpid(),
            manifest_digest=self._manifest_digest,
            sent_bytes=self._traffic.sent_bytes,
            received_bytes=self._traffic.received_bytes,
        )
        if self._loaded:
            status.first_layer, status.last_layer = (
                self._loaded.spec.first_layer,
                self._loaded.spec.last_layer,
            )
            status.dtype = wire.NAMES[self._loaded.dtype]
        if self._wiring:
            status.epoch = self._wiring.epoch
            status.next_lost = self._wiring.next_lost
            status.next_error = self._wiring.next_error
            status.busy_share = self._wiring.stage.busy.share()
        return status

    async def _configure(self, request: wire_pb2.Configuration, _context: object) -> wire_pb2.Configured:
        if request.version != wire.VERSION:
            return wire_pb2.Configured(
                error=f"speaks protocol {wire.VERSION}, not {request.version}: use one version of mdi"
            )
        if self._loaded is None:
            return wire_pb2.Configured(error=self.error or "is still loading")
        if request.manifest_digest != self._manifest_digest:
            return wire_pb2.Configured(
                error="has a chunk of another plan, dtype or checkpoint: "
                "run `mdi prepare` again, and give every node its new chunk"
            )
        await self._unwire()
        stage = Stage(self._loaded, n_slots=request.n_slots, sequence_length=request.sequence_length)
        self._wiring = Wiring(request.epoch, stage)
        if request.next_address:
            self._wiring.open(request.next_address, request.next_name, self._identity, self._traffic)
        return wire_pb2.Configured()

    async def _unwire(self) -> None:
        wiring, self._wiring = self._wiring, None
        if wiring:
            await wiring.close()

    async def _batches(self, pieces: AsyncIterator[wire_pb2.Piece], _context: object) -> wire_pb2.Configured:
        if self._loaded is None:
            return wire_pb2.Configured(error="is not configured")
        decoder = wire.BatchDecoder(self._loaded.config.hidden_size, self._loaded.dtype)
        try:
            async for piece in pieces:
                wiring = self._wiring
                if wiring is None or piece.epoch != wiring.epoch:
                    continue
                if piece.HasField("failure"):
                    self._work.put((wiring, piece.failure))
                elif (work := decoder.add(piece)) is not None:
                    self._work.put((wiring, work))
        except LinkError as error:
            if self._wiring:
                self._work.put((self._wiring, self._failure(error)))
        return wire_pb2.Configured()

    async def _results(self, request: wire_pb2.ResultsRequest, _context: object) -> AsyncIterator[wire_pb2.Result]:
        wiring = self._wiring
        if wiring is None or wiring.epoch != request.epoch:
            return
        while (message := await wiring.out.get()) is not None:
            assert isinstance(message, wire_pb2.Result)
            yield message

    def _compute(self) -> None:
        """The compute thread: one batch after the other, in order of arrival."""
        while self._serve(self._work.get()):  # holding on to no old wiring while it waits
            pass

    def _serve(self, item: tuple[Wiring, Work] | None) -> bool:
        """Computes a batch, or drops it when its epoch is over; False at the end."""
        if item is None:
            return False
        wiring, work = item
        if wiring is self._wiring:
            for message in self._outcome(wiring.stage, wiring.epoch, work):
                self._asyncio.call_soon_threadsafe(wiring.out.put_nowait, message)
        return True

    def _outcome(self, stage: Stage, epoch: int, work: Work) -> list[Outgoing]:
        try:
            if isinstance(work, tuple):
                out = stage.run(*work)
                if isinstance(out, Tensor):
                    return list(wire.encode_batch(work[0], out, epoch))
                return [wire.encode_result(Result(work[0].id, out), epoch)]
            failure = work
        except Exception as error:
            log.exception("a batch could not be computed")
            failure = self._failure(error)
        if stage.spec.head:
            return [wire_pb2.Result(epoch=epoch, failure=failure)]
        return [wire_pb2.Piece(epoch=epoch, failure=failure)]

    def _failure(self, error: Exception) -> wire_pb2.Failure:
        text = str(error) if isinstance(error, MDIError) else "it could not compute a batch; its log has the details"
        return wire_pb2.Failure(node=self.name, message=text)
