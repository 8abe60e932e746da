"""The server around one stage: batches in, activations or results out. The same for every node but the starter.

asyncio owns the sockets, one thread computes; while a batch is computed, the next is received and the one before sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import psutil
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from mdi.checkpoint.cache import CachedChunk, ChunkCache
from mdi.checkpoint.loader import load_chunk
from mdi.checkpoint.manifest import ChunkEntry, Manifest
from mdi.core.batch import Batch, Result
from mdi.core.dtypes import dtype_name, parse_dtype
from mdi.core.errors import CheckpointError, ConfigError, LinkError, MDIError
from mdi.core.progress import Progress
from mdi.core.tracing import BusyMeter, Recorder
from mdi.layers.rope import Grid
from mdi.models.stage import LoadedStage, Stage
from mdi.models.vision import VisionTower
from mdi.node.encode import collect_rows, embedding_pieces, rows_of, run_to_end
from mdi.node.weights import Intake
from mdi.planning.hardware import measure_hardware
from mdi.rpc import codec, node_pb2
from mdi.rpc.callers import CallerCheck
from mdi.rpc.channel import (
    CHANNEL_OPTIONS,
    HEARTBEAT_S,
    KEEPALIVE_OPTIONS,
    MISSED_BEATS,
    SERVER_OPTIONS,
    add_port,
    is_loopback,
    open_channel,
)
from mdi.rpc.diagnose import why_unreachable
from mdi.rpc.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server
from mdi.rpc.tls import NODE_NAME, VARIABLE, Identity
from mdi.rpc.traffic import Traffic, TrafficInterceptor, node_stub

log = logging.getLogger(__name__)

Work = tuple[Batch, Tensor] | node_pb2.Failure
Outgoing = node_pb2.BatchPiece | node_pb2.BatchResult
State = node_pb2.NodeStatus
LEAVE_TIMEOUT_S = 30.0


def serve_node(
    name: str,
    chunk: Path | None,
    *,
    listen: str,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    with_parent: bool = False,
    insecure: bool = False,
    identity: Identity | None = None,
    cache: ChunkCache | None = None,
    hands_over: bool = False,
    progress: Progress | None = None,
) -> None:
    """Serves a chunk's stage until told to stop (SIGTERM, SIGINT).

    name: its role, or a spare's own name. chunk: None waits for the starter to send it; `cache` is where it is kept
    then, and where another goes that the starter has in its place. hands_over: told to stop, it waits to be replaced by
    a spare. progress: told (what is done, bytes done, bytes in all) while it receives and loads.
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
    if chunk is None and cache:
        cache.check()
    node = Node(
        name, chunk, device=device, dtype=dtype, identity=identity, cache=cache, progress=progress or _no_progress
    )
    asyncio.run(_serve(node, listen, insecure, identity, stop_if_failed=not with_parent, hands_over=hands_over))
    if node.error and not with_parent:
        raise CheckpointError(node.error)


async def _serve(
    node: Node, listen: str, insecure: bool, identity: Identity | None, stop_if_failed: bool, hands_over: bool
) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        if hands_over and node.leave(stop.set):
            print(f"node {node.name} hands over to a spare; again to end at once", file=sys.stderr)  # noqa: T201
            loop.call_later(LEAVE_TIMEOUT_S, stop.set)
        else:
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    options = (*CHANNEL_OPTIONS, *SERVER_OPTIONS, ("grpc.so_reuseport", 0))
    server = grpc.aio.server(options=options, interceptors=node.interceptors())
    add_NodeServicer_to_server(node, server)
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


def _end_with_standard_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # a node holds nothing worth saving, and its parent is gone


class Wiring:
    """One epoch of a node: its stage, what waits to be sent, and the stream to the next node if there is one.

    A batch belongs to the wiring it arrived in: once that is replaced, what it still computes goes nowhere.
    """

    def __init__(self, epoch: int, stage: Stage, previous_name: str) -> None:
        self.epoch = epoch
        self.stage = stage
        self.previous_name = previous_name
        self.out: asyncio.Queue[Outgoing | None] = asyncio.Queue()
        self.next_lost = False
        self.next_error = ""
        self._closing = False
        self._channel: grpc.aio.Channel | None = None
        self._sender: asyncio.Task[None] | None = None
        self._explaining: asyncio.Task[None] | None = None

    def open(self, next_address: str, next_name: str, identity: Identity | None, traffic: Traffic) -> None:
        """Begins to send what is put into `out` to the next node."""
        options = (*CHANNEL_OPTIONS, *KEEPALIVE_OPTIONS)
        self._next = next_address, next_name, identity
        self._channel = open_channel(*self._next, options)
        self._sender = asyncio.create_task(self._send(node_stub(self._channel, traffic).Batches()))

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


class Node(NodeServicer):
    """One chunk's stage behind the gRPC service of codec.proto. See `serve_node`.

    The chunk is the one it was given, or the one that the starter offers: then it is in the cache, or sent.
    """

    def __init__(
        self,
        name: str,
        chunk: Path | None,
        *,
        device: str,
        dtype: str | None,
        identity: Identity | None,
        cache: ChunkCache | None,
        progress: Progress,
    ) -> None:
        self._chunk = chunk
        self._device = device
        self._dtype = dtype
        self._identity = identity
        self.name = name
        self._spare = name if name.startswith("spare") else ""
        self._manifest_digest = ""
        self._sha256 = ""  # of the chunk that is loaded, or is being loaded and was verified
        self._loading = False
        self._loaded: LoadedStage | None = None
        self.error = ""
        self._cache = cache
        self._intake = Intake()
        self._offering = asyncio.Lock()
        self._seeing = asyncio.Lock()  # one image after the other
        self._busy = BusyMeter()  # of a vision node
        self._recorder = Recorder()
        self._damaged = ""  # why the chunk that was sent is of no use
        self._asked_s = -math.inf  # when the starter last asked
        self._released: Callable[[], None] | None = None
        self._show = progress
        self._progress = (0, 0)
        self._traffic = Traffic()
        self._wiring: Wiring | None = None
        self._work: queue.SimpleQueue[tuple[Wiring, Work] | None] = queue.SimpleQueue()

    @property
    def previous_name(self) -> str:
        """The name in the certificate of the node before this one; empty while there is none."""
        return self._wiring.previous_name if self._wiring else ""

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """What its server runs around every call."""
        check = [CallerCheck(lambda: self.previous_name)] if self._identity else []
        return [*check, TrafficInterceptor(self._traffic)]

    def start(self, failed: Callable[[], None]) -> None:
        """Begins to load, and to compute what arrives. failed: called in the event loop when the chunk is no good."""
        self._asyncio = asyncio.get_running_loop()
        self._failed = failed
        if self._chunk:
            self._begin_loading(self._chunk)
        threading.Thread(target=self._compute, name="mdi-compute", daemon=True).start()

    async def stop(self) -> None:
        """Ends the sending side."""
        self._work.put(None)
        await self._intake.stop()
        await self._unwire()

    def leave(self, released: Callable[[], None]) -> bool:
        """Says from now on that it is about to end; False when nobody has to be told, or was already.

        released: called in the event loop when another has taken its place, or none can.
        """
        asked = time.monotonic() - self._asked_s < MISSED_BEATS * HEARTBEAT_S
        if self._wiring is None or not asked or self._released:
            return False
        self._released = released
        return True

    def _begin_loading(self, chunk: Path, cached: CachedChunk | None = None) -> None:
        self._loading = True
        threading.Thread(target=self._load, args=(chunk, cached), name="mdi-load", daemon=True).start()

    def _load(self, chunk: Path, cached: CachedChunk | None) -> None:
        def note_verified(manifest: Manifest, entry: ChunkEntry) -> None:
            self._manifest_digest, self._sha256 = manifest.digest, entry.sha256

        try:
            self._loaded = load_chunk(
                chunk,
                device=self._device,
                dtype=self._dtype,
                progress=self._note,
                verified=note_verified,
            )
        except CheckpointError as error:
            self._reject(cached, error) if cached else self._fail(str(error))
        except MDIError as error:
            self._fail(str(error))
        except Exception:
            log.exception("the chunk could not be loaded")
            self._fail("the chunk could not be loaded; this node's log has the details")
        finally:
            self._loading = False

    def _fail(self, error: str) -> None:
        self.error = error
        self._asyncio.call_soon_threadsafe(self._failed)

    def _reject(self, cached: CachedChunk, error: CheckpointError) -> None:
        """What is wrong in the cache is no loss: the starter has it."""
        log.warning("%s; it is removed, and asked for again", error)
        self._manifest_digest = self._sha256 = ""
        self._damaged = str(error) if self._intake.came_whole else ""
        try:
            cached.discard()
        except CheckpointError as refused:
            self._fail(str(refused))

    def _note(self, what: str, done: int, total: int) -> None:
        self._progress = (done, total)
        self._show(what, done, total)

    async def Status(self, _request: node_pb2.StatusRequest, _context: object) -> node_pb2.NodeStatus:
        done, total = self._progress
        self._asked_s = time.monotonic()
        status = State(
            state=self._state(),
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
            spare=self._spare,
            leaving=self._released is not None,
        )
        if self._loaded:
            status.first_layer, status.last_layer = (
                self._loaded.spec.first_layer,
                self._loaded.spec.last_layer,
            )
            status.dtype = dtype_name(self._loaded.dtype)
            status.busy_share = self._busy.share()
        if self._wiring:
            status.epoch = self._wiring.epoch
            status.next_lost = self._wiring.next_lost
            status.next_error = self._wiring.next_error
            status.busy_share = self._wiring.stage.busy.share()
        return status

    def _state(self) -> node_pb2.NodeStatus.State:
        if self.error:
            return State.FAILED
        if self._loaded:
            return State.LOADED
        if self._loading:
            return State.LOADING
        return State.RECEIVING if self._intake.receiving else State.WAITING

    async def Offer(self, request: node_pb2.OfferRequest, _context: object) -> node_pb2.OfferReply:
        """Whose chunk this node is to hold: it has it, or gets it from the cache, or wants it sent."""
        if request.version != codec.VERSION:
            return node_pb2.OfferReply(error=_other_version(request.version))
        try:
            async with self._offering:
                return await self._answer_offer(Manifest.parse(request.manifest), request.role)
        except CheckpointError as error:
            return node_pb2.OfferReply(error=str(error))

    async def _answer_offer(self, manifest: Manifest, role: str) -> node_pb2.OfferReply:
        chunk = self._place(manifest, role)
        if self._sha256 == chunk.entry.sha256:
            self.name, self._manifest_digest = role, manifest.digest
            return node_pb2.OfferReply(ready=True)
        if self._loading:
            return node_pb2.OfferReply()
        await self._drop()
        self.name = role
        if self._damaged:
            error, self._damaged = self._damaged, ""
            return node_pb2.OfferReply(damaged=True, error=error)
        have_bytes = await self._intake.expect(chunk)
        if chunk.complete:
            self._begin_loading(chunk.path, chunk)
            return node_pb2.OfferReply()
        return node_pb2.OfferReply(wanted=True, have_bytes=have_bytes)

    def _place(self, manifest: Manifest, role: str) -> CachedChunk:
        """Where the role's chunk is kept. Raises CheckpointError when this node cannot take it."""
        if not NODE_NAME.fullmatch(role) or (role != self.name and not self._spare):
            raise CheckpointError(f"is {self.name}, and cannot be {role}")
        if self._cache is None:
            raise CheckpointError("was started for its own chunk alone: start it with --nodes-config")
        if self._dtype and parse_dtype(self._dtype) != parse_dtype(manifest.dtype):
            raise CheckpointError(
                f"is to compute in {self._dtype}, and the chunks are {manifest.dtype}: "
                f"run `mdi prepare --dtype {self._dtype}`, or change its dtype"
            )
        return self._cache.chunk(manifest, role)

    async def _drop(self) -> None:
        await self._unwire()
        self._loaded, self._sha256, self._manifest_digest = None, "", ""

    async def Weights(self, pieces: AsyncIterator[node_pb2.WeightsPiece], _context: object) -> node_pb2.WeightsReply:
        try:
            chunk = await self._intake.receive(pieces, self._note)
        except CheckpointError as error:
            log.error("%s", error)
            return node_pb2.WeightsReply(error=str(error))
        if chunk:
            self._begin_loading(chunk.path, chunk)
        return node_pb2.WeightsReply()

    async def Encode(
        self, pieces: AsyncIterator[node_pb2.EncodePiece], _context: object
    ) -> AsyncIterator[node_pb2.EmbeddingsPiece]:
        try:
            digest, grid, data = await collect_rows(pieces)
            if self._loaded is None or self._loaded.vision is None or self._manifest_digest != digest:
                raise LinkError(self.error or "does not have these weights, or is still loading them")
            async with self._seeing:
                embeddings = await asyncio.to_thread(self._see, self._loaded.vision, rows_of(self._loaded, grid, data))
            for piece in embedding_pieces(embeddings):
                yield piece
        except LinkError as error:
            yield node_pb2.EmbeddingsPiece(error=str(error))

    def _see(self, tower: VisionTower, patches: tuple[Tensor, Grid]) -> Tensor:
        with self._busy, self._recorder.span("encode"), torch.inference_mode():
            return run_to_end(tower.encode_steps(*patches))

    async def MeasureHardware(
        self, request: node_pb2.MeasureHardwareRequest, _context: object
    ) -> node_pb2.MeasureHardwareReply:
        folder = self._cache.folder if self._cache else None
        found = await asyncio.to_thread(measure_hardware, self._device, self._dtype or request.dtype, folder)
        return node_pb2.MeasureHardwareReply(
            bytes_per_s=found.bytes_per_s, flops_per_s=found.flops_per_s, memory_bytes=found.memory_bytes
        )

    async def Spans(self, request: node_pb2.SpansRequest, _context: object) -> node_pb2.SpansReply:
        return codec.encode_spans(self._recorder.take(request.record), time.perf_counter())

    async def Release(self, _request: node_pb2.ReleaseRequest, _context: object) -> node_pb2.ReleaseReply:
        if self._released:
            self._asyncio.call_soon(self._released)
        return node_pb2.ReleaseReply()

    async def Configure(self, request: node_pb2.ConfigureRequest, _context: object) -> node_pb2.ConfigureReply:
        if request.version != codec.VERSION:
            return node_pb2.ConfigureReply(error=_other_version(request.version))
        if self._loaded is None:
            return node_pb2.ConfigureReply(error=self.error or "is still loading")
        if request.manifest_digest != self._manifest_digest:
            return node_pb2.ConfigureReply(
                error="has a chunk of another plan, dtype or checkpoint: "
                "run `mdi prepare` again, and give every node its new chunk"
            )
        await self._unwire()
        stage = Stage(
            self._loaded,
            n_slots=request.n_slots,
            sequence_length=request.sequence_length,
            recorder=self._recorder,
        )
        self._wiring = Wiring(request.epoch, stage, request.previous_name)
        if request.next_address:
            self._wiring.open(request.next_address, request.next_name, self._identity, self._traffic)
        return node_pb2.ConfigureReply()

    async def _unwire(self) -> None:
        wiring, self._wiring = self._wiring, None
        if wiring:
            await wiring.close()

    async def Batches(self, pieces: AsyncIterator[node_pb2.BatchPiece], _context: object) -> node_pb2.BatchesReply:
        if self._loaded is None or self._wiring is None:
            return node_pb2.BatchesReply(error="is not configured")
        decoder = codec.BatchDecoder(self._loaded.config.hidden_size, self._loaded.dtype)
        try:
            async for piece in pieces:
                wiring = self._wiring
                if wiring is None or piece.epoch != wiring.epoch:
                    continue
                if piece.HasField("failure"):
                    self._work.put((wiring, piece.failure))
                elif (work := decoder.add(piece)) is not None:
                    self._work.put((wiring, work))
        except (LinkError, DecodeError) as error:
            if self._wiring:
                known = error if isinstance(error, LinkError) else LinkError(codec.OTHER_VERSION)
                self._work.put((self._wiring, self._failure(known)))
        return node_pb2.BatchesReply()

    async def Results(self, request: node_pb2.ResultsRequest, _context: object) -> AsyncIterator[node_pb2.BatchResult]:
        wiring = self._wiring
        if wiring is None or wiring.epoch != request.epoch:
            return
        while (message := await wiring.out.get()) is not None:
            assert isinstance(message, node_pb2.BatchResult)
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
                batch, hidden = work[0], stage.run(*work)
                if not stage.spec.head:
                    return list(codec.encode_batch(batch, hidden, epoch))
                return [codec.encode_result(Result(batch.id, stage.sample(batch, hidden)), epoch)]
            failure = work
        except Exception as error:
            log.exception("a batch could not be computed")
            failure = self._failure(error)
        if stage.spec.head:
            return [node_pb2.BatchResult(epoch=epoch, failure=failure)]
        return [node_pb2.BatchPiece(epoch=epoch, failure=failure)]

    def _failure(self, error: Exception) -> node_pb2.Failure:
        text = str(error) if isinstance(error, MDIError) else "it could not compute a batch; its log has the details"
        return node_pb2.Failure(node=self.name, message=text)


def _other_version(theirs: int) -> str:
    return f"speaks protocol {codec.VERSION}, not {theirs}: use one version of mdi"


def _no_progress(_what: str, _done: int, _total: int) -> None:
    pass
