"""Client for one node: every call of the starter to it, over one channel.

What goes wrong is a LinkError here, and nowhere else: the reason is looked for (`rpc.diagnose`) after a call failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import torch
from google.protobuf.message import Message
from torch import Tensor

from mdi.checkpoint.manifest import Manifest
from mdi.core.errors import LinkError
from mdi.core.tracing import Span
from mdi.layers.rope import Grid
from mdi.planning.hardware import LinkSpeed, Machine
from mdi.rpc import codec, node_pb2
from mdi.rpc.channel import CHANNEL_OPTIONS, KEEPALIVE_OPTIONS, open_channel, spoken
from mdi.rpc.diagnose import diagnose
from mdi.rpc.group_join import Member
from mdi.rpc.sockets import host_and_port
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic, node_stub
from mdi.rpc.version import HERE, Protocol, disagreement

RPC_TIMEOUT_S = 5.0
CONFIGURE_TIMEOUT_S = 20.0  # on a slow link it waits behind what was sent before
MEASURE_TIMEOUT_S = 60.0  # the slowest of machines
OPTIONS = (
    *CHANNEL_OPTIONS,
    *KEEPALIVE_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 500),  # a node that is back answers the next heartbeat
)

T = TypeVar("T", bound=Message)


@dataclass(frozen=True)
class NodeAddress:
    """A node's role, where it listens, host:port, and its own id: the name in its certificate.

    role: what the plan gives it; empty for a spare without one. id: the role unless given.
    """

    role: str
    address: str
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", self.role)

    @property
    def name(self) -> str:
        """Its role, or the id of a spare without one."""
        return self.role or self.id


class NodeClient:
    """All calls to one node. Belongs to the event loop in which it is made.

    traffic: counts the bytes of batches and results. Methods raise LinkError when the node does not answer, or another
    node does.
    """

    def __init__(self, node: NodeAddress, identity: Identity | None, traffic: Traffic | None = None) -> None:
        self.node = node
        self._identity = identity
        self._channel = open_channel(node.address, node.id, identity, OPTIONS)
        self._stub = node_stub(self._channel, traffic)

    async def __aenter__(self) -> NodeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all calls. Safe to call twice."""
        await self._channel.close()

    async def status(
        self, timeout_s: float = RPC_TIMEOUT_S, *, wait_for_ready: bool = False, diagnose: bool = True
    ) -> node_pb2.NodeStatus:
        """What the node reports of itself. diagnose: False raises LinkError at once, without the reason.

        Also raises LinkError when the two sides do not understand each other, with the one to be upgraded.
        """
        call = self._stub.Status(node_pb2.StatusRequest(), timeout=timeout_s, wait_for_ready=wait_for_ready)
        status: node_pb2.NodeStatus = await self._answer(call, diagnose=diagnose)
        if status.node != self.node.id:
            raise self._error(
                f"at {self.node.address} is {status.node}: start each node with its own number and --chunk"
            )
        if status.version and (error := disagreement(Protocol.of(status.version, status.oldest_version), HERE)):
            raise self._error(f"{self.node.address}: {error}")
        return status

    async def watch(self) -> AsyncIterator[node_pb2.NodeStatus]:
        """The node's status, which it sends every second. Raises LinkError when it is silent, or the stream breaks."""
        call = self._stub.Watch(node_pb2.StatusRequest())
        try:
            async for status in spoken(call):
                yield status
        except grpc.aio.AioRpcError as error:
            raise self._error(self._no_answer(error)) from None
        finally:
            call.cancel()

    async def configure(self, request: node_pb2.ConfigureRequest) -> node_pb2.ConfigureReply:
        """Begins an epoch. Raises LinkError when the node refuses."""
        reply: node_pb2.ConfigureReply = await self._answer(self._stub.Configure(request, timeout=CONFIGURE_TIMEOUT_S))
        if reply.error:
            raise self._error(reply.error)
        return reply

    async def offer(self, manifest: Manifest, role: str) -> node_pb2.OfferReply:
        """Names the chunk that the node is to hold."""
        request = node_pb2.OfferRequest(
            version=HERE.version, oldest_version=HERE.oldest, manifest=manifest.model_dump_json(), role=role
        )
        return await self._answer(self._stub.Offer(request, timeout=RPC_TIMEOUT_S))

    async def send_weights(
        self, pieces: AsyncIterator[node_pb2.WeightsPiece], sent: Callable[[node_pb2.WeightsPiece], None]
    ) -> None:
        """Sends pieces of the chunk that was offered. sent: called after each. Passes on what `pieces` raises."""
        call, broke = self._stub.Weights(), f"the link to node {self.node.name} broke"
        listening = asyncio.create_task(self._listen(call))
        try:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reply says why
                async for piece in pieces:
                    await call.write(piece)
                    sent(piece)
                await call.done_writing()
            reply = codec.received(await call)
        except grpc.aio.AioRpcError:
            raise self._error(f"{broke} while it was sent its weights") from None
        except asyncio.CancelledError:
            if listening.done() and (silence := listening.result()):
                raise self._error(f"{broke} while it was sent its weights: {silence}") from None
            raise
        finally:
            call.cancel()
            listening.cancel()
        if reply.error:
            raise self._error(f"node {self.node.name}: {reply.error}")

    async def encode(self, digest: str, rows: Tensor, grid: Grid, width: int) -> Tensor:
        """Encodes one image or video on a vision node. rows: in the dtype of its weights -> [tokens, width], the same.

        digest: of the manifest that its weights are of.
        """
        call = self._stub.Encode(_encode_pieces(digest, rows, grid))
        data = bytearray()
        try:
            async for piece in call:
                if codec.received(piece).error:
                    raise self._error(piece.error)
                data += piece.data
        except grpc.aio.AioRpcError as error:
            raise self._error(self._no_answer(error)) from None
        finally:
            call.cancel()
        if not data or len(data) % (width * rows.itemsize):
            raise self._error(f"{len(data)} bytes of embeddings arrived, of {width} numbers a token")
        return torch.frombuffer(data, dtype=rows.dtype).view(-1, width)

    async def measure_hardware(self, dtype: str, quantization: str | None) -> Machine:
        """What the node's machine can do. dtype: for a node that was given none. quantization: of the weights."""
        await self.status()
        request = node_pb2.MeasureHardwareRequest(dtype=dtype, quantization=quantization or "")
        reply = await self._answer(self._stub.MeasureHardware(request, timeout=MEASURE_TIMEOUT_S))
        return Machine(reply.bytes_per_s, reply.flops_per_s, reply.memory_bytes)

    async def listen(self, peer: str) -> Member:
        """Lets the node open a port for another, which then measures the link. peer: the id of the other one."""
        reply = await self._measure_link(node_pb2.MeasureLinkRequest(peer=peer))
        return Member(self.node.id, host_and_port(self.node.address)[0], reply.port)

    async def measure_link(self, listening: Member) -> LinkSpeed:
        """The link of the node to one that listens. For the starter's own: `rpc.measure_link`."""
        request = node_pb2.MeasureLinkRequest(peer=listening.id, address=listening.address, port=listening.port)
        reply = await self._measure_link(request)
        return LinkSpeed(reply.rtt_s, reply.bytes_per_s)

    async def _measure_link(self, request: node_pb2.MeasureLinkRequest) -> node_pb2.MeasureLinkReply:
        reply: node_pb2.MeasureLinkReply = await self._answer(
            self._stub.MeasureLink(request, timeout=MEASURE_TIMEOUT_S)
        )
        if reply.error:
            raise self._error(reply.error)
        return reply

    async def spans(self, record: bool) -> list[Span]:
        """What the node did since the last call, by this machine's clock. record: whether to note more."""
        asked_s = time.perf_counter()
        reply = await self._answer(self._stub.Spans(node_pb2.SpansRequest(record=record), timeout=RPC_TIMEOUT_S))
        return codec.decode_spans(reply, asked_s, time.perf_counter())

    async def release(self) -> None:
        """Lets a leaving node end. One that is gone already needs no leave."""
        with contextlib.suppress(LinkError):
            call = self._stub.Release(node_pb2.ReleaseRequest(), timeout=RPC_TIMEOUT_S)
            await self._answer(call, diagnose=False)

    async def send_batches(self, outbox: asyncio.Queue[node_pb2.BatchPiece]) -> None:
        """Sends what is put into `outbox`, until the stream breaks: then it raises LinkError."""
        call = self._stub.Batches()

        async def end() -> str:
            async for reply in spoken(call):
                if reply.error:
                    return str(reply.error)
            return ""

        await self._send_all(call, outbox, end())

    async def send_masks(self, outbox: asyncio.Queue[node_pb2.BatchMasks]) -> None:
        """The same for the token masks of batches, to the node with the head."""
        call = self._stub.TokenMasks()

        async def end() -> str:
            return str(codec.received(await call).error)

        await self._send_all(call, outbox, end())

    async def _send_all(self, call: Any, outbox: asyncio.Queue[Any], end: Awaitable[str]) -> None:
        """end: of the stream, with the node's error. An idle stream of writes alone would not notice that it broke."""
        writing = asyncio.create_task(_write_all(call, outbox))
        try:
            error = await end
        except grpc.aio.AioRpcError as failure:
            raise self._error(self._no_answer(failure)) from None
        finally:
            writing.cancel()
            call.cancel()
        raise self._error(error or "it ended the stream")

    async def _listen(self, upload: grpc.aio.StreamUnaryCall) -> str:
        """Ends an upload to a node that has become silent; the error. Empty when the stream of its status breaks."""
        try:
            async for _ in spoken(self._stub.Watch(node_pb2.StatusRequest())):
                pass
        except grpc.aio.AioRpcError:
            return ""
        except LinkError as error:
            upload.cancel()
            return str(error)
        return ""

    async def results(self, epoch: int) -> AsyncIterator[node_pb2.BatchResult]:
        """The results of an epoch as they come, until the stream ends or, with LinkError, breaks."""
        call = self._stub.Results(node_pb2.ResultsRequest(epoch=epoch))
        try:
            async for result in call:
                yield codec.received(result)
        except grpc.aio.AioRpcError as error:
            raise self._error(self._no_answer(error)) from None
        finally:
            call.cancel()

    async def diagnosed(self, error: LinkError) -> LinkError:
        """The same error with the reason in its place, if one can be found now."""
        node = self.node
        reason = await asyncio.to_thread(diagnose, node.address, node.id, self._identity)
        return self._error(reason) if reason else error

    async def _answer(self, call: Awaitable[T | None], *, diagnose: bool = True) -> T:
        try:
            return codec.received(await call)
        except grpc.aio.AioRpcError as failure:
            error = self._error(self._no_answer(failure))
        raise await self.diagnosed(error) if diagnose else error

    def _no_answer(self, error: grpc.aio.AioRpcError) -> str:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return f"{self.node.address} is of an older version of mdi than the server: upgrade it on that machine"
        return f"{self.node.address} does not answer ({error.details() or error.code().name.lower()})"

    def _error(self, message: str) -> LinkError:
        return LinkError(message, self.node.name)


async def _write_all(call: Any, outbox: asyncio.Queue[Any]) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reply says why
        while True:
            await call.write(await outbox.get())


async def _encode_pieces(digest: str, rows: Tensor, grid: Grid) -> AsyncIterator[node_pb2.EncodePiece]:
    head = node_pb2.EncodePiece(manifest_digest=digest, grid=grid)
    for data in codec.pieces(rows):
        head.data = data
        yield head
        head = node_pb2.EncodePiece()
