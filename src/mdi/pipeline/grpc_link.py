"""The starter's end of the pipeline: control over every node, batches to the second, results from the last.

One thread with an asyncio loop of its own; the engine hands batches over without waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from torch import Tensor

from mdi.errors import LinkError
from mdi.model.batch import Batch
from mdi.pipeline import wire, wire_pb2
from mdi.pipeline.link import Deliver, NodeStatus

T = TypeVar("T")
POLL_S = 0.05
RPC_TIMEOUT_S = 10.0

LoadProgress = Callable[[str, int, int], None]
"""Told (node, bytes done, bytes in all) while nodes load."""


@dataclass(frozen=True)
class NodeAddress:
    """A node's name and where it listens, host:port."""

    name: str
    address: str


@dataclass(frozen=True)
class PipelineSettings:
    """What all nodes must agree on. manifest_digest: see `Manifest.digest`."""

    manifest_digest: str
    n_slots: int
    sequence_length: int
    epoch: int = 1


class GrpcLink:
    """Connected to nodes that are loaded, configured and wired to each other. Make one with `connect`."""

    def __init__(self, nodes: Sequence[NodeAddress], settings: PipelineSettings, deliver: Deliver) -> None:
        self._nodes = nodes
        self._settings = settings
        self._deliver = deliver
        self._closing = self._broken = False
        self._channels: list[grpc.aio.Channel] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._outbox: asyncio.Queue[wire_pb2.Piece] = asyncio.Queue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="mdi-link", daemon=True)
        self._thread.start()

    @classmethod
    def connect(
        cls,
        nodes: Sequence[NodeAddress],
        settings: PipelineSettings,
        deliver: Deliver,
        *,
        progress: LoadProgress | None = None,
        timeout_s: float = 600.0,
    ) -> GrpcLink:
        """Waits until every node has loaded, configures them and opens the streams.

        nodes: all but the starter, in pipeline order. Raises LinkError, naming the node, when one cannot be reached,
        failed to load, is of another version or plan, or is not ready within `timeout_s`.
        """
        link = cls(nodes, settings, deliver)
        try:
            link._call(link._open(progress, timeout_s))
        except BaseException:
            link.close()
            raise
        return link

    def send(self, batch: Batch, hidden: Tensor) -> None:
        """Hands a batch over; hidden: [tokens, hidden_size]."""
        for piece in wire.encode_batch(batch, hidden, self._settings.epoch):
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, piece)

    def status(self) -> list[NodeStatus]:
        """What every node holds, asked now."""
        return self._call(self._statuses())

    def close(self) -> None:
        """Ends the streams and the thread. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self, progress: LoadProgress | None, timeout_s: float) -> None:
        self._channels = [grpc.aio.insecure_channel(node.address, options=wire.CHANNEL_OPTIONS) for node in self._nodes]
        deadline = time.monotonic() + timeout_s
        await asyncio.gather(*(self._await_loaded(index, progress, deadline) for index in range(len(self._nodes))))
        following = [node.address for node in self._nodes[1:]] + [""]
        for index in reversed(range(len(self._nodes))):
            await self._configure(index, following[index])
        results = self._channels[-1].unary_stream(
            wire.method("Results"),
            request_serializer=wire.serialize,
            response_deserializer=lambda data: wire.parse(wire_pb2.Result, data),
        )(wire_pb2.ResultsRequest(epoch=self._settings.epoch))
        batches = self._channels[0].stream_unary(wire.method("Batches"), request_serializer=wire.serialize)()
        # an idle stream of writes alone would not notice that its node is gone
        batches.add_done_callback(lambda _: self._lost(self._nodes[0].name))
        self._tasks = [asyncio.create_task(self._send(batches)), asyncio.create_task(self._receive(results))]

    async def _await_loaded(self, index: int, progress: LoadProgress | None, deadline: float) -> None:
        node = self._nodes[index]
        while True:
            status = await self._status(index)
            if progress and status.total_bytes:
                progress(node.name, status.done_bytes, status.total_bytes)
            if status.state == wire_pb2.NodeStatus.FAILED:
                raise LinkError(f"node {node.name}: {status.error}")
            if status.state == wire_pb2.NodeStatus.LOADED:
                return
            if time.monotonic() > deadline:
                raise LinkError(f"node {node.name} did not finish loading in time")
            await asyncio.sleep(POLL_S)

    async def _status(self, index: int) -> wire_pb2.NodeStatus:
        return await self._ask(index, "Status", wire_pb2.StatusRequest(), wire_pb2.NodeStatus)

    async def _configure(self, index: int, next_address: str) -> None:
        settings = self._settings
        request = wire_pb2.Configuration(
            version=wire.VERSION,
            epoch=settings.epoch,
            manifest_digest=settings.manifest_digest,
            n_slots=settings.n_slots,
            sequence_length=settings.sequence_length,
            next_address=next_address,
        )
        answer = await self._ask(index, "Configure", request, wire_pb2.Configured)
        if answer.error:
            raise LinkError(f"node {self._nodes[index].name} {answer.error}")

    async def _ask(self, index: int, name: str, request: Message, answer: type[wire.M]) -> wire.M:
        call = self._channels[index].unary_unary(
            wire.method(name),
            request_serializer=wire.serialize,
            response_deserializer=lambda data: wire.parse(answer, data),
        )
        try:
            return await call(request, timeout=RPC_TIMEOUT_S)  # type: ignore[no-any-return]
        except grpc.aio.AioRpcError as error:
            raise LinkError(f"node {self._nodes[index].name} does not answer ({error.code().name.lower()})") from None

    async def _statuses(self) -> list[NodeStatus]:
        found = await asyncio.gather(*(self._status(index) for index in range(len(self._nodes))))
        return [
            NodeStatus(node.name, s.first_layer, s.last_layer, s.dtype, s.device, s.resident_bytes, s.pid)
            for node, s in zip(self._nodes, found, strict=True)
        ]

    async def _send(self, call: grpc.aio.StreamUnaryCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(await self._outbox.get())

    async def _receive(self, call: grpc.aio.UnaryStreamCall) -> None:
        try:
            async for message in call:
                if message.epoch == self._settings.epoch:
                    self._deliver(wire.decode_result(message))
        except (grpc.aio.AioRpcError, LinkError):
            pass
        self._lost(self._nodes[-1].name)

    def _lost(self, name: str) -> None:
        if not self._closing and not self._broken:
            self._broken = True
            self._deliver(LinkError(f"the link to node {name} broke: did it end?"))

    async def _shut(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for channel in self._channels:
            await channel.close()
