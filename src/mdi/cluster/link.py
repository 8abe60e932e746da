"""The starter's end of the pipeline: control over every node, batches to the second, results from the last.

One thread with an asyncio loop of its own; the engine hands batches over without waiting. Knows addresses, no
processes: it tells that a node is lost, and is told where to find all of them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from torch import Tensor

from mdi.cluster.delivery import Deliver
from mdi.cluster.loop_thread import LoopThread
from mdi.core.batch import Batch
from mdi.core.errors import LinkError
from mdi.core.progress import Progress
from mdi.core.status import NodeState, NodeStatus
from mdi.core.tracing import Span
from mdi.rpc import codec, node_pb2
from mdi.rpc.channel import CHANNEL_OPTIONS, HEARTBEAT_S, MISSED_BEATS, open_channel
from mdi.rpc.diagnose import why_unreachable
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic, node_stub

log = logging.getLogger(__name__)

T = TypeVar("T")
POLL_S = 0.05
RPC_TIMEOUT_S = 5.0
STATES: dict[int, NodeState] = {
    node_pb2.NodeStatus.LOADING: "loading",
    node_pb2.NodeStatus.LOADED: "loaded",
    node_pb2.NodeStatus.FAILED: "failed",
    node_pb2.NodeStatus.WAITING: "waiting",
    node_pb2.NodeStatus.RECEIVING: "receiving",
}


@dataclass(frozen=True)
class NodeAddress:
    """A node's name and where it listens, host:port. spare: the own name of a spare in its place, or empty."""

    name: str
    address: str
    spare: str = ""

    @property
    def certificate(self) -> str:
        """The name in its certificate."""
        return self.spare or self.name


@dataclass(frozen=True)
class PipelineSettings:
    """What all nodes must agree on. manifest_digest: see `Manifest.digest`. first_epoch: of the first wiring."""

    manifest_digest: str
    n_slots: int
    sequence_length: int
    first_epoch: int = 1


class GrpcLink:
    """Connected to nodes that are loaded, configured and wired to each other. Make one with `connect`.

    A loss is delivered as a LinkError, once an epoch at most; `unwire` and `wire` make the next epoch.
    """

    def __init__(
        self,
        settings: PipelineSettings,
        deliver: Deliver,
        progress: Progress | None = None,
        identity: Identity | None = None,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._epoch = settings.first_epoch - 1
        self._deliver = deliver
        self._progress = progress
        self._closing = False
        self._changing = threading.Lock()  # held while wires are pulled or laid
        self._names: list[str] = []
        self._seen: dict[str, NodeStatus] = {}
        self._traffic = Traffic()
        self._wiring: Wiring | None = None
        self._opening: asyncio.Task[None] | None = None
        self._thread = LoopThread("mdi-link")

    @classmethod
    def connect(
        cls,
        nodes: Sequence[NodeAddress],
        settings: PipelineSettings,
        deliver: Deliver,
        *,
        progress: Progress | None = None,
        timeout_s: float = 600.0,
        identity: Identity | None = None,
    ) -> GrpcLink:
        """Waits until every node has loaded, configures them and opens the streams.

        nodes: all but the starter, in pipeline order. identity: encrypts all links; None: in the clear.
        Raises LinkError, naming the node, when one cannot be reached, failed to load, is of another version or plan, or
        is not ready within `timeout_s`.
        """
        link = cls(settings, deliver, progress, identity)
        try:
            link.wire(nodes, timeout_s)
        except BaseException:
            link.close()
            raise
        return link

    @property
    def traffic(self) -> Traffic:
        """Bytes of batches sent and of results received, over all epochs."""
        return self._traffic

    def unwire(self) -> None:
        """Drops everything in flight. Nothing is delivered until `wire`."""
        with self._changing:
            if not self._closing:
                self._call(self._unwire())

    def wire(self, nodes: Sequence[NodeAddress], timeout_s: float) -> None:
        """Connects in a new epoch. Raises as `connect` does, and when the link is closed."""
        with self._changing:
            if self._closing:
                raise LinkError("the link was closed")
            self._epoch += 1
            self._names = [node.name for node in nodes]
            self._call(self._open(nodes, timeout_s))

    def send(self, batch: Batch, hidden: Tensor) -> None:
        """Hands a batch over; hidden: [tokens, hidden_size]."""
        wiring = self._wiring
        if wiring:
            for piece in codec.encode_batch(batch, hidden, wiring.epoch):
                self._thread.post(wiring.outbox.put_nowait, piece)

    def status(self) -> list[NodeStatus]:
        """What was last heard of every node, a second ago or less where it is well."""
        return [self._seen[name] for name in self._names if name in self._seen]

    def spans(self, record: bool) -> dict[str, list[Span]]:
        """What every node did since it was last asked, by this machine's clock. record: whether to note more.

        Raises LinkError when one does not answer.
        """
        wiring = self._wiring
        return self._call(wiring.spans(record)) if wiring else {}

    def close(self) -> None:
        """Ends the streams and the thread, and fails a `wire` that waits. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self._thread.post(self._stop_opening)
        with self._changing:
            self._call(self._unwire())
        self._thread.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return self._thread.call(coroutine)
        except CancelledError:
            raise LinkError("the link was closed") from None

    async def _open(self, nodes: Sequence[NodeAddress], timeout_s: float) -> None:
        self._opening = asyncio.current_task()
        if self._closing:
            raise LinkError("the link was closed")
        self._wiring = Wiring(
            nodes, self._settings, self._epoch, self._deliver, self._seen, self._traffic, self._identity
        )
        try:
            await self._wiring.open(self._progress, time.monotonic() + timeout_s)
        except BaseException:
            await self._unwire()
            raise
        finally:
            self._opening = None

    async def _unwire(self) -> None:
        wiring, self._wiring = self._wiring, None
        if wiring:
            await wiring.close()

    def _stop_opening(self) -> None:
        if self._opening:
            self._opening.cancel()


class Wiring:
    """One epoch: channels to all nodes, the stream of batches, the stream of results, and heartbeats. Asyncio only.

    seen: where what is heard of the nodes is kept, by name.
    """

    def __init__(
        self,
        nodes: Sequence[NodeAddress],
        settings: PipelineSettings,
        epoch: int,
        deliver: Deliver,
        seen: dict[str, NodeStatus],
        traffic: Traffic,
        identity: Identity | None,
    ) -> None:
        self.epoch = epoch
        self.outbox: asyncio.Queue[node_pb2.BatchPiece] = asyncio.Queue()
        self._nodes = nodes
        self._settings = settings
        self._deliver = deliver
        self._seen = seen
        self._traffic = traffic
        self._over = False  # lost or closed: nothing more is delivered
        self._identity = identity
        self._channels = [open_channel(node.address, node.certificate, identity, CHANNEL_OPTIONS) for node in nodes]
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, progress: Progress | None, deadline: float) -> None:
        """See `GrpcLink.connect`. Whatever happens, `close` it in the end."""
        loading = [self._await_loaded(index, progress, deadline) for index in range(len(self._nodes))]
        await self._all(loading)
        for index in reversed(range(len(self._nodes))):
            await self._configure(index)
        results = node_stub(self._channels[-1], self._traffic).Results(node_pb2.ResultsRequest(epoch=self.epoch))
        batches = node_stub(self._channels[0], self._traffic).Batches()
        # an idle stream of writes alone would not notice that its node is gone
        batches.add_done_callback(lambda _: self._lose_link(self._nodes[0].name))
        self._tasks = [asyncio.create_task(self._send(batches)), asyncio.create_task(self._receive(results))]
        self._tasks += [asyncio.create_task(self._watch(index)) for index in range(len(self._nodes))]

    async def close(self) -> None:
        """Ends the streams; nothing is delivered afterwards."""
        self._over = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def _all(self, coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
        """Runs them together; the first error ends all."""
        try:
            async with asyncio.TaskGroup() as group:
                for coroutine in coroutines:
                    group.create_task(coroutine)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _await_loaded(self, index: int, progress: Progress | None, deadline: float) -> None:
        node = self._nodes[index]
        while True:
            try:
                status = await self._status(index, RPC_TIMEOUT_S)
            except LinkError as error:
                raise await self._explained(node, error) from None
            if progress and status.total_bytes:
                progress(node.name, status.done_bytes, status.total_bytes)
            if status.state == node_pb2.NodeStatus.FAILED:
                raise LinkError(f"node {node.name}: {status.error}", node.name)
            if status.state in (node_pb2.NodeStatus.WAITING, node_pb2.NodeStatus.RECEIVING):
                raise LinkError(f"node {node.name} was started anew, and has no weights yet", node.name)
            if status.state == node_pb2.NodeStatus.LOADED:
                return
            if time.monotonic() > deadline:
                raise LinkError(f"node {node.name} did not finish loading in time", node.name)
            await asyncio.sleep(POLL_S)

    async def _explained(self, node: NodeAddress, error: LinkError) -> LinkError:
        reason = await asyncio.to_thread(why_unreachable, node.address, node.certificate, self._identity)
        return LinkError(f"{error}: {reason}", node.name) if reason else error

    async def _configure(self, index: int) -> None:
        name, settings = self._nodes[index].name, self._settings
        following = self._nodes[index + 1] if index + 1 < len(self._nodes) else NodeAddress("", "")
        request = node_pb2.ConfigureRequest(
            version=codec.VERSION,
            epoch=self.epoch,
            manifest_digest=settings.manifest_digest,
            n_slots=settings.n_slots,
            sequence_length=settings.sequence_length,
            next_address=following.address,
            next_name=following.certificate,
            previous_name=self._nodes[index - 1].certificate if index else "starter",
        )
        answer = await self._ask(index, "Configure", request, node_pb2.ConfigureReply, RPC_TIMEOUT_S)
        if answer.error:
            raise LinkError(f"node {name} {answer.error}", name)
        self._seen[name] = replace(self._seen[name], state="ready")

    async def _watch(self, index: int) -> None:
        """Asks a node every second how it is; silent three times in a row, it is lost."""
        node, missed = self._nodes[index], 0
        while missed < MISSED_BEATS:
            asked_s = time.monotonic()
            try:
                status = await self._status(index, HEARTBEAT_S)
            except LinkError:
                missed += 1
            else:
                missed = 0
                if fault := self._fault(index, status):
                    self._lose(fault)
                    return
            await asyncio.sleep(asked_s + HEARTBEAT_S - time.monotonic())
        self._lose(LinkError(f"node {node.name} was silent for {MISSED_BEATS * HEARTBEAT_S:g} s", node.name))

    def _fault(self, index: int, status: node_pb2.NodeStatus) -> LinkError | None:
        name = self._nodes[index].name
        if status.epoch != self.epoch:
            return LinkError(f"node {name} was started anew", name)
        if status.next_lost:
            after = self._nodes[index + 1].name
            why = status.next_error or "did it end?"
            return LinkError(f"the link from node {name} to node {after} broke: {why}", after)
        return None

    async def _status(self, index: int, timeout_s: float) -> node_pb2.NodeStatus:
        asked_s = time.monotonic()
        status = await self._ask(index, "Status", node_pb2.StatusRequest(), node_pb2.NodeStatus, timeout_s)
        seen = node_status(status, self._nodes[index].name, time.monotonic() - asked_s)
        ready = seen.state == "loaded" and status.epoch == self.epoch
        self._seen[seen.name] = replace(seen, state="ready") if ready else seen
        return status

    async def spans(self, record: bool) -> dict[str, list[Span]]:
        """See `GrpcLink.spans`."""
        taken = await asyncio.gather(*(self._spans(index, record) for index in range(len(self._nodes))))
        return dict(zip((node.name for node in self._nodes), taken, strict=True))

    async def _spans(self, index: int, record: bool) -> list[Span]:
        asked_s = time.perf_counter()
        request = node_pb2.SpansRequest(record=record)
        answer = await self._ask(index, "Spans", request, node_pb2.SpansReply, RPC_TIMEOUT_S)
        return codec.decode_spans(answer, asked_s, time.perf_counter())

    async def _ask(self, index: int, name: str, request: Message, answer: type[codec.M], timeout_s: float) -> codec.M:
        node = self._nodes[index].name
        call = self._channels[index].unary_unary(
            codec.method(name),
            request_serializer=codec.serialize,
            response_deserializer=lambda data: codec.parse(answer, data),
        )
        try:
            return await call(request, timeout=timeout_s)  # type: ignore[no-any-return]
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                raise LinkError(f"node {node} refuses this one: {error.details()}", node) from None
            raise LinkError(f"node {node} does not answer ({error.code().name.lower()})", node) from None

    async def _send(self, call: grpc.aio.StreamUnaryCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(await self.outbox.get())

    async def _receive(self, call: grpc.aio.UnaryStreamCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, LinkError):
            async for message in call:
                if codec.received(message).epoch == self.epoch and not self._over:
                    self._deliver(codec.decode_result(message))
        self._lose_link(self._nodes[-1].name)

    def _lose_link(self, name: str) -> None:
        self._lose(LinkError(f"the link to node {name} broke: did it end?", name))

    def _lose(self, error: LinkError) -> None:
        if not self._over:
            self._over = True
            self._deliver(error)


def node_status(status: node_pb2.NodeStatus, name: str, round_trip_s: float) -> NodeStatus:
    """What a node said of itself when it was asked under this name."""
    return NodeStatus(
        name=name,
        state="leaving" if status.leaving else STATES[status.state],
        first_layer=status.first_layer,
        last_layer=status.last_layer,
        dtype=status.dtype,
        device=status.device,
        resident_bytes=status.resident_bytes,
        pid=status.pid,
        busy_share=status.busy_share,
        sent_bytes=status.sent_bytes,
        received_bytes=status.received_bytes,
        round_trip_s=round_trip_s,
        spare=status.spare,
    )
