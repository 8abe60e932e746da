"""The service of one node: a short method for every RPC, and the server process around it. The starter has none."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable

import grpc
import psutil
import torch

from mdi.checkpoint.manifest import Manifest
from mdi.core.errors import CheckpointError, ConfigError, LinkError
from mdi.core.tracing import Recorder
from mdi.kernels.threads import computes_with, set_threads
from mdi.models.stage import Stage
from mdi.models.weights import LoadedStage
from mdi.node.encode import Encoder, collect_rows
from mdi.node.lifecycle import Lifecycle
from mdi.node.membership import Membership
from mdi.node.settings import NodeSettings
from mdi.node.worker import Arrivals, Epoch, Worker
from mdi.planning.hardware import measure_hardware
from mdi.planning.memory import free_bytes
from mdi.rpc import codec, node_pb2
from mdi.rpc.callers import CallerCheck
from mdi.rpc.channel import CHANNEL_OPTIONS, HEARTBEAT_S, SERVER_OPTIONS, add_port, is_loopback
from mdi.rpc.group_join import Member
from mdi.rpc.measure_link import listen, measure_link
from mdi.rpc.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server
from mdi.rpc.tls import VARIABLE, Identity
from mdi.rpc.traffic import Traffic, TrafficInterceptor
from mdi.rpc.version import HERE, IN_GROUP, Protocol, disagreement

log = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 30.0


def serve_node(settings: NodeSettings) -> None:
    """Serves one node until SIGTERM or SIGINT.

    One line of JSON on standard output names the port before a chunk is loaded, so that Status answers meanwhile.
    Raises ConfigError when the address cannot be bound, or must not be without `insecure`; CheckpointError, without a
    parent, for a chunk that cannot be loaded.
    """
    set_threads(settings.threads, settings.device)
    if settings.chunk is None and settings.cache:
        settings.cache.check()
    if error := asyncio.run(_serve(settings)):
        raise CheckpointError(error)


async def _serve(settings: NodeSettings) -> str:
    """Why the chunk could not be loaded, for a node without a parent; empty otherwise."""
    service, stop = NodeService(settings), asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        if settings.hands_over and service.leave(stop.set):
            print(f"node {settings.name} hands over to a spare; again to end at once", file=sys.stderr)  # noqa: T201
            loop.call_later(LEAVE_TIMEOUT_S, stop.set)
        else:
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    server = service.server()
    port = _bind(server, settings.listen, settings.insecure, settings.identity)
    await server.start()
    print(json.dumps({"port": port}), flush=True)  # noqa: T201 - what the launcher waits for
    if not settings.with_parent:
        host, safety = settings.listen.rpartition(":")[0], "encrypted" if settings.identity else "not encrypted"
        where = f"listens at {host}:{port}, {safety}"
        print(f"node {settings.name} {where}; on CPUs: {computes_with()}", file=sys.stderr)  # noqa: T201
    service.start((lambda: None) if settings.with_parent else stop.set)
    await stop.wait()
    await server.stop(grace=0.2)
    await service.stop()
    return "" if settings.with_parent else service.error


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


class NodeService(NodeServicer):
    """The RPC methods of one node. See `node.proto` for what they do, and `rpc/callers.py` for who may call them."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._traffic = Traffic()
        self._group_traffic = Traffic()
        self._recorder = Recorder()
        self._worker = Worker()
        self._configuring = asyncio.Lock()
        self._encoder = Encoder(self._recorder)
        self._lifecycle = Lifecycle(settings, drop=self._worker.end_epoch)

    @property
    def error(self) -> str:
        """Why the chunk could not be loaded; empty when it could, or is being loaded."""
        return self._lifecycle.error

    def server(self) -> grpc.aio.Server:
        """A server of this service that checks who calls, and counts the bytes of the links."""
        check = [CallerCheck(self._previous_node)] if self._settings.identity else []
        options = (*CHANNEL_OPTIONS, *SERVER_OPTIONS, ("grpc.so_reuseport", 0))
        server = grpc.aio.server(options=options, interceptors=[*check, TrafficInterceptor(self._traffic)])
        add_NodeServicer_to_server(self, server)
        return server

    def start(self, failed: Callable[[], None]) -> None:
        """Starts to load, and to compute what arrives. failed: called when the chunk cannot be loaded."""
        self._lifecycle.start(failed)
        self._worker.start()

    async def stop(self) -> None:
        """Ends transfers, the stream to the next node, and the compute thread."""
        await self._lifecycle.stop()
        await self._worker.stop()

    def leave(self, released: Callable[[], None]) -> bool:
        """See `Lifecycle.leave`. False as well when this node is in no pipeline."""
        return self._worker.epoch is not None and self._lifecycle.leave(released)

    async def Status(self, _request: node_pb2.StatusRequest, _context: object) -> node_pb2.NodeStatus:
        status, epoch = self._lifecycle.status(), self._worker.epoch
        status.resident_bytes = psutil.Process().memory_info().rss
        status.pid = os.getpid()
        status.version, status.oldest_version = HERE.version, HERE.oldest
        status.free_bytes = free_bytes(torch.device(self._settings.device))
        links, ranks = self._traffic, self._group_traffic
        status.sent_bytes = links.sent_bytes + ranks.sent_bytes
        status.received_bytes = links.received_bytes + ranks.received_bytes
        status.group_received_bytes = ranks.received_bytes
        status.busy_share = (epoch.stage.busy if epoch else self._encoder.busy).share()
        if epoch:
            status.steps, status.step_s = epoch.stage.steps, epoch.stage.step_s
            status.epoch, status.next_lost, status.next_error = epoch.number, epoch.next_lost, epoch.next_error
            status.lost_node = epoch.lost_node
        return status

    async def Watch(self, request: node_pb2.StatusRequest, context: object) -> AsyncIterator[node_pb2.NodeStatus]:
        while True:
            yield await self.Status(request, context)
            await asyncio.sleep(HEARTBEAT_S)

    async def Offer(self, request: node_pb2.OfferRequest, _context: object) -> node_pb2.OfferReply:
        if error := disagreement(HERE, Protocol.of(request.version, request.oldest_version)):
            return node_pb2.OfferReply(error=error)
        try:
            return await self._lifecycle.offer(Manifest.parse(request.manifest), request.role)
        except CheckpointError as error:
            return node_pb2.OfferReply(error=str(error))

    async def Weights(self, pieces: AsyncIterator[node_pb2.WeightsPiece], _context: object) -> node_pb2.WeightsReply:
        try:
            await self._lifecycle.receive(codec.parsed(pieces))
        except (CheckpointError, LinkError) as error:
            log.error("%s", error)
            return node_pb2.WeightsReply(error=str(error))
        return node_pb2.WeightsReply()

    async def Encode(
        self, pieces: AsyncIterator[node_pb2.EncodePiece], _context: object
    ) -> AsyncIterator[node_pb2.EmbeddingsPiece]:
        try:
            digest, grid, data = await collect_rows(codec.parsed(pieces))
            embeddings = await self._encoder.encode(self._lifecycle.holding(digest), grid, data)
            for part in codec.pieces(embeddings):
                yield node_pb2.EmbeddingsPiece(data=part)
        except LinkError as error:
            yield node_pb2.EmbeddingsPiece(error=str(error))

    async def Configure(self, request: node_pb2.ConfigureRequest, _context: object) -> node_pb2.ConfigureReply:
        async with self._configuring:  # a call that was given up may still go on
            return await self._configure(request)

    async def _configure(self, request: node_pb2.ConfigureRequest) -> node_pb2.ConfigureReply:
        here, oldest = (IN_GROUP, request.version) if request.group else (HERE, request.oldest_version)
        if error := disagreement(here, Protocol.of(request.version, oldest)):
            return node_pb2.ConfigureReply(error=error)
        loaded = self._lifecycle.loaded
        if loaded is None:
            return node_pb2.ConfigureReply(error=self.error or "is still loading")
        if request.manifest_digest != self._lifecycle.manifest_digest:
            return node_pb2.ConfigureReply(
                error="has a chunk of another plan, dtype, quantisation or checkpoint: "
                "run `mdi prepare` again, and give every node its new chunk"
            )
        await self._worker.end_epoch()
        n_slots, sequence_length = request.n_slots, request.sequence_length
        try:
            stage = Stage(
                loaded,
                n_slots=n_slots,
                sequence_length=sequence_length,
                cache_dtype=request.kv_cache_dtype or None,
                shards=request.shards,
                recorder=self._recorder,
            )
        except ConfigError as error:
            return node_pb2.ConfigureReply(error=str(error))
        epoch = Epoch(request.epoch, stage, self._lifecycle.role or self._settings.name, request.previous_node)
        try:
            port = await self._link(epoch, request, loaded)
        except LinkError as error:
            await epoch.close()
            return node_pb2.ConfigureReply(error=str(error))
        except asyncio.CancelledError:
            await epoch.close()
            raise
        self._worker.epoch = epoch
        if epoch.membership:
            self._worker.put(epoch, epoch.membership)
        return node_pb2.ConfigureReply(link_port=port)

    async def _link(self, epoch: Epoch, request: node_pb2.ConfigureRequest, loaded: LoadedStage) -> int:
        """Begins an epoch's links to other nodes; the port where this one listens for them. Raises LinkError."""
        settings, traffic, port = self._settings, self._traffic, 0
        if membership := self._membership(request, loaded):
            epoch.membership, port = membership, membership.port
        if request.previous_node:
            port = epoch.listen(settings, traffic, Arrivals(self._worker, epoch, loaded))
        if request.next_address:
            await epoch.open(settings, traffic, request)
        return port

    def _membership(self, request: node_pb2.ConfigureRequest, loaded: LoadedStage) -> Membership | None:
        """Raises LinkError for a place in a group that is not that of this node's weights."""
        rank = loaded.spec.rank
        if rank is None and not request.group:
            return None
        if rank is None or not 0 <= request.rank < len(request.group):
            raise LinkError("has weights for another place in a group: run `mdi prepare` again")
        own = request.group[request.rank]
        if (own.first_shard, own.last_shard) != (rank.first_shard, rank.last_shard):
            raise LinkError("has weights for another place in a group: run `mdi prepare` again")
        return Membership(request, rank, self._settings.link_place, self._settings.identity, self._group_traffic)

    async def Batches(
        self, pieces: AsyncIterator[node_pb2.BatchPiece], _context: object
    ) -> AsyncIterator[node_pb2.BatchesReply]:
        epoch, loaded = self._worker.epoch, self._lifecycle.loaded
        if epoch is None or loaded is None:
            yield node_pb2.BatchesReply(error="is not configured")
            return
        taking = asyncio.create_task(self._take_batches(epoch, loaded, pieces))
        try:
            while not taking.done():
                yield node_pb2.BatchesReply()
                await asyncio.wait([taking], timeout=HEARTBEAT_S)
            taking.result()
        finally:
            taking.cancel()

    async def _take_batches(
        self, epoch: Epoch, loaded: LoadedStage, pieces: AsyncIterator[node_pb2.BatchPiece]
    ) -> None:
        arrivals = Arrivals(self._worker, epoch, loaded)
        try:
            async for piece in codec.parsed(pieces):
                arrivals.add(piece)
        except LinkError as error:
            arrivals.ended(error)

    async def TokenMasks(
        self, messages: AsyncIterator[node_pb2.BatchMasks], _context: object
    ) -> node_pb2.TokenMasksReply:
        epoch = self._worker.epoch
        if epoch is None:
            return node_pb2.TokenMasksReply(error="is not configured")
        try:
            async for message in codec.parsed(messages):
                if message.epoch == epoch.number:
                    epoch.masks.add(message.batch_id, message.masks)
        except LinkError as error:
            return node_pb2.TokenMasksReply(error=str(error))
        finally:
            epoch.masks.close()
        return node_pb2.TokenMasksReply()

    async def Results(self, request: node_pb2.ResultsRequest, _context: object) -> AsyncIterator[node_pb2.BatchResult]:
        epoch = self._worker.epoch
        if epoch is None or epoch.number != request.epoch:
            return
        while (message := await epoch.outgoing.get()) is not None:
            assert isinstance(message, node_pb2.BatchResult)
            yield message

    async def MeasureHardware(
        self, request: node_pb2.MeasureHardwareRequest, _context: object
    ) -> node_pb2.MeasureHardwareReply:
        settings = self._settings
        folder = settings.cache.folder if settings.cache else None
        dtype, quantization = settings.dtype or request.dtype, request.quantization or None
        found = await asyncio.to_thread(measure_hardware, settings.device, dtype, folder, quantization)
        return node_pb2.MeasureHardwareReply(
            bytes_per_s=found.bytes_per_s, flops_per_s=found.flops_per_s, memory_bytes=found.memory_bytes
        )

    async def MeasureLink(self, request: node_pb2.MeasureLinkRequest, _context: object) -> node_pb2.MeasureLinkReply:
        own, identity, place = self._settings.name, self._settings.identity, self._settings.link_place
        try:
            if not request.address:
                return node_pb2.MeasureLinkReply(port=listen(own, request.peer, place, identity))
            listening = Member(request.peer, request.address, request.port)
            found = await asyncio.to_thread(measure_link, own, listening, identity)
        except LinkError as error:
            return node_pb2.MeasureLinkReply(error=str(error))
        return node_pb2.MeasureLinkReply(rtt_s=found.rtt_s, bytes_per_s=found.bytes_per_s)

    async def Spans(self, request: node_pb2.SpansRequest, _context: object) -> node_pb2.SpansReply:
        return codec.encode_spans(self._recorder.take(request.record), time.perf_counter())

    async def Release(self, _request: node_pb2.ReleaseRequest, _context: object) -> node_pb2.ReleaseReply:
        self._lifecycle.release()
        return node_pb2.ReleaseReply()

    def _previous_node(self) -> str:
        return self._worker.epoch.previous_node if self._worker.epoch else ""
