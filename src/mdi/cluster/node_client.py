"""A visit to one node started by hand: is it there, is it the one that is meant, and has it the weights it needs?

Knows one address at a time; who is to be visited, and when again, is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum

import grpc
from google.protobuf.message import Message

from mdi.checkpoint.manifest import chunk_file
from mdi.checkpoint.prepare import Chunks
from mdi.cluster.link import STATES, NodeAddress
from mdi.cluster.upload import send_chunk
from mdi.core.errors import LinkError
from mdi.core.progress import Progress
from mdi.core.tracing import Span
from mdi.planning.hardware import Machine
from mdi.rpc import codec, node_pb2
from mdi.rpc.channel import CHANNEL_OPTIONS, PATIENT_OPTIONS, open_channel
from mdi.rpc.diagnose import why_unreachable
from mdi.rpc.tls import Identity

POLL_S = 1.0
CHECK_POLL_S = 0.1
RPC_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 60.0  # the slowest of machines

Note = Callable[[bool, str], None]
"""Told whether a node is there, and what it does or why it cannot be reached."""


class Visit(Enum):
    """READY: it holds the right weights, or is loading them. LEAVING: it was told to end."""

    READY = "ready"
    AWAY = "away"
    LEAVING = "leaving"


@dataclass(frozen=True)
class Visitor:
    """Visits in the name of the starter. chunks: None leaves the nodes with what they have.

    progress: told (what is sent, bytes sent, bytes in all).
    """

    identity: Identity | None
    chunks: Chunks | None
    progress: Progress | None

    async def visit(self, node: NodeAddress, note: Note) -> Visit:
        """Finds a node, and gives it its weights. Ends early when something is amiss: it may be tried again.

        Raises LinkError when the weights arrive damaged, CheckpointError when they cannot be read here.
        """
        if reason := await self._why_unreachable(node):
            note(False, reason)
            return Visit.AWAY
        try:
            async with self._channel(node) as channel:
                status = await _status(channel)
                if amiss := _amiss(node, status):
                    note(False, amiss)
                    return Visit.LEAVING if status.leaving else Visit.AWAY
                if self.chunks is None:
                    note(True, STATES[status.state])
                    return Visit.READY
                return await self._equip(channel, node, self.chunks, note)
        except grpc.aio.AioRpcError as error:
            note(False, _no_answer(node, error))
            return Visit.AWAY

    async def look(self, node: NodeAddress) -> node_pb2.NodeStatus | str:
        """What a node says of itself, or why it cannot be reached."""
        if reason := await self._why_unreachable(node):
            return reason
        try:
            async with self._channel(node) as channel:
                status = await _status(channel)
        except grpc.aio.AioRpcError as error:
            return _no_answer(node, error)
        return status if status.spare == node.spare else _mistaken(node, status)

    async def probe(self, node: NodeAddress, dtype: str) -> Machine | str:
        """What a node's machine can do, or why that is not known. dtype: for a node that was given none."""
        if reason := await self._why_unreachable(node):
            return reason
        try:
            async with self._channel(node) as channel:
                asked = node_pb2.MeasureHardwareRequest(dtype=dtype)
                found = await _ask(channel, "MeasureHardware", asked, node_pb2.MeasureHardwareReply, PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return _no_answer(node, error)
        return Machine(found.bytes_per_s, found.flops_per_s, found.memory_bytes)

    async def spans(self, node: NodeAddress, record: bool) -> list[Span]:
        """What a node did since it was last asked, by this machine's clock. Raises LinkError without an answer."""
        try:
            async with self._channel(node) as channel:
                await _status(channel)  # once connected, the answer is a matter of moments
                asked_s = time.perf_counter()
                answer = await _ask(channel, "Spans", node_pb2.SpansRequest(record=record), node_pb2.SpansReply)
                return codec.decode_spans(answer, asked_s, time.perf_counter())
        except grpc.aio.AioRpcError as error:
            raise LinkError(_no_answer(node, error), node.name) from None

    async def release(self, node: NodeAddress) -> None:
        """Lets a node go that is leaving; one that is gone already needs no leave."""
        try:
            async with self._channel(node) as channel:
                await _ask(channel, "Release", node_pb2.ReleaseRequest(), node_pb2.ReleaseReply)
        except grpc.aio.AioRpcError:
            pass

    async def _why_unreachable(self, node: NodeAddress) -> str | None:
        return await asyncio.to_thread(why_unreachable, node.address, node.certificate, self.identity)

    @asynccontextmanager
    async def _channel(self, node: NodeAddress) -> AsyncIterator[grpc.aio.Channel]:
        options = (*CHANNEL_OPTIONS, *PATIENT_OPTIONS)
        channel = open_channel(node.address, node.certificate, self.identity, options)
        try:
            yield channel
        finally:
            await channel.close()

    async def _equip(self, channel: grpc.aio.Channel, node: NodeAddress, chunks: Chunks, note: Note) -> Visit:
        entry = chunks.manifest.chunk(chunk_file(node.name))
        file = chunks.folder / entry.file
        offer = node_pb2.OfferRequest(version=codec.VERSION, manifest=chunks.manifest.model_dump_json(), role=node.name)
        while True:
            answer = await _ask(channel, "Offer", offer, node_pb2.OfferReply)
            if answer.damaged:
                raise LinkError(
                    f"node {node.name} was sent weights that are not what the manifest says ({answer.error}): "
                    f"is {str(file)!r} damaged here? Run `mdi prepare` again",
                    node.name,
                )
            if answer.error:
                note(False, answer.error)
                return Visit.AWAY
            if answer.ready:
                note(True, "has its weights")
                return Visit.READY
            if not answer.wanted:
                note(True, "checks the weights it has")
                await asyncio.sleep(CHECK_POLL_S)
                continue
            note(True, "receives its weights")

            try:
                await send_chunk(channel, node.name, file, entry, answer.have_bytes, self.progress)
            except LinkError as error:
                note(False, str(error))
                return Visit.AWAY


def _amiss(node: NodeAddress, status: node_pb2.NodeStatus) -> str | None:
    if status.spare != node.spare or not (node.spare or status.name == node.name):
        return _mistaken(node, status)
    if status.leaving:
        return "was told to end"
    return str(status.error) if status.state == node_pb2.NodeStatus.FAILED else None


def _mistaken(node: NodeAddress, status: node_pb2.NodeStatus) -> str:
    return f"at {node.address} is {status.spare or status.name}: start each node with its own number and --chunk"


def _no_answer(node: NodeAddress, error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return f"{node.address} is of an older version: use one version of mdi"
    return f"{node.address} does not answer ({error.details()})"


async def _status(channel: grpc.aio.Channel) -> node_pb2.NodeStatus:
    return await _ask(channel, "Status", node_pb2.StatusRequest(), node_pb2.NodeStatus)


async def _ask(
    channel: grpc.aio.Channel, name: str, request: Message, answer: type[codec.M], timeout_s: float = RPC_TIMEOUT_S
) -> codec.M:
    call = channel.unary_unary(
        codec.method(name),
        request_serializer=codec.serialize,
        response_deserializer=lambda data: codec.parse(answer, data),
    )
    return await call(request, timeout=timeout_s)  # type: ignore[no-any-return]
