"""The starter's end of the pipeline: batches to the second node, results from the last, one epoch after the other.

Knows addresses, no processes: it reports that a node is lost, and is given all addresses again.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from mdi.cluster.delivery import Deliver
from mdi.cluster.monitor import Heartbeat, Monitor
from mdi.cluster.node_client import NodeAddress
from mdi.cluster.wires import Wires
from mdi.core.batch import Batch
from mdi.core.errors import LinkError
from mdi.core.group import Rank
from mdi.core.progress import Progress
from mdi.core.status import NodeStatus
from mdi.core.tracing import Span
from mdi.models.stage import Stage
from mdi.rpc import codec, node_pb2
from mdi.rpc.channel import HEARTBEAT_S, MISSED_BEATS
from mdi.rpc.direct_link import DirectReceiver, DirectSender, connect
from mdi.rpc.group_join import Member, Purpose
from mdi.rpc.group_link import GroupLink
from mdi.rpc.sockets import host_and_port
from mdi.rpc.version import HERE, IN_GROUP

T = TypeVar("T")
LOADING_POLL_S = 0.05
JOIN_TIMEOUT_S = 20.0  # until all ranks of the first stage are linked


@dataclass(frozen=True)
class PipelineSettings:
    """What all nodes must agree on. manifest_digest: see `Manifest.digest`. first_epoch: of the first wiring.

    ranks: of every node, the starter first, as its weights are cut; empty where there are no groups.
    """

    manifest_digest: str
    n_slots: int
    sequence_length: int
    kv_cache_dtype: str | None = None
    shards: int = 1
    first_epoch: int = 1
    ranks: tuple[Rank | None, ...] = ()


class GrpcLink:
    """The link from the first stage to all the others, for callers in any thread.

    `wire` begins an epoch and `unwire` ends it. A loss is delivered as a LinkError, once an epoch at most. stage: the
    first one, which gets its group at each wiring, where it has one.
    """

    def __init__(
        self,
        monitor: Monitor,
        settings: PipelineSettings,
        deliver: Deliver,
        progress: Progress | None = None,
        stage: Stage | None = None,
    ) -> None:
        self._monitor = monitor
        self._settings = settings
        self._number = settings.first_epoch - 1
        self._deliver = deliver
        self._progress = progress
        self._stage = stage
        self._closing = False
        self._changing = threading.Lock()  # held while wires are pulled or laid
        self._nodes: Sequence[NodeAddress] = ()
        self._heartbeats: Sequence[Heartbeat] = ()
        self._epoch: LinkEpoch | None = None
        self._opening: asyncio.Task[None] | None = None

    def wire(self, nodes: Sequence[NodeAddress], timeout_s: float) -> None:
        """Waits until every node has loaded, configures them in a new epoch, and opens the streams.

        nodes: all but the starter, in pipeline order. Raises LinkError, naming the node, when one cannot be reached,
        failed to load, is of another version or plan, or is not ready in time; and when the link is closed.
        """
        with self._changing:
            if self._closing:
                raise LinkError("the link was closed")
            self._number += 1
            self._nodes = tuple(nodes)
            self._call(self._open(time.monotonic() + timeout_s))

    def unwire(self) -> None:
        """Drops everything in flight. Nothing is delivered until `wire`."""
        with self._changing:
            if not self._closing:
                self._call(self._close_epoch())

    def send(self, batch: Batch, hidden: Tensor) -> None:
        """Sends a batch. hidden: [tokens, hidden_size]."""
        epoch = self._epoch
        if epoch:
            for masks in codec.encode_masks(batch, epoch.number):
                self._monitor.loop.post(epoch.masks.put_nowait, masks)
            for piece in codec.encode_batch(batch, hidden, epoch.number):
                if epoch.direct:
                    epoch.direct.send(piece)
                else:
                    self._monitor.loop.post(epoch.outbox.put_nowait, piece)

    def named(self, error: LinkError) -> LinkError:
        """The same error with a node's role where it has its id."""
        return named(error, self._nodes)

    def leave_group(self) -> None:
        """Ends the first stage's links to its ranks: a step that waits for a lost one raises LinkError."""
        epoch = self._epoch
        if epoch and epoch.group:
            epoch.group.close()

    def status(self) -> list[NodeStatus]:
        """What was last heard of every node."""
        nodes = zip(self._nodes, self._heartbeats, strict=False)
        return [heartbeat.shown(node.name, self._number) for node, heartbeat in nodes]

    def spans(self, record: bool) -> dict[str, list[Span]]:
        """What every node did since the last call, by this machine's clock. record: whether to note more.

        Raises LinkError when one does not answer.
        """
        epoch = self._epoch
        return self._call(epoch.spans(record)) if epoch else {}

    def close(self) -> None:
        """Ends the streams, and fails a `wire` that waits. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self._monitor.loop.post(self._stop_opening)
        with self._changing:
            self._call(self._close_epoch())

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return self._monitor.loop.call(coroutine)
        except CancelledError:
            raise LinkError("the link was closed") from None

    async def _open(self, deadline: float) -> None:
        self._opening = asyncio.current_task()
        if self._closing:
            raise LinkError("the link was closed")
        self._heartbeats = [await self._monitor.watch(node) for node in self._nodes]
        epoch = self._epoch = LinkEpoch(
            self._number, self._nodes, self._heartbeats, self._settings, self._deliver, self._monitor
        )
        try:
            await epoch.open(self._progress, deadline)
            if self._stage:
                self._stage.group = epoch.group
        except BaseException:
            await self._close_epoch()
            raise
        finally:
            self._opening = None

    async def _close_epoch(self) -> None:
        epoch, self._epoch = self._epoch, None
        if epoch:
            await epoch.close()

    def _stop_opening(self) -> None:
        if self._opening:
            self._opening.cancel()


class LinkEpoch:
    """One wiring of all links: the stream of batches, the stream of results, and the first loss. Asyncio only."""

    def __init__(
        self,
        number: int,
        nodes: Sequence[NodeAddress],
        heartbeats: Sequence[Heartbeat],
        settings: PipelineSettings,
        deliver: Deliver,
        monitor: Monitor,
    ) -> None:
        self.number = number
        self.group: GroupLink | None = None  # to the ranks of the first stage
        self.direct: DirectSender | None = None  # in place of `outbox`
        self._results: DirectReceiver[node_pb2.BatchResult] | None = None
        self._monitor = monitor
        self._delivering = threading.Lock()  # held while a result is delivered
        self.outbox: asyncio.Queue[node_pb2.BatchPiece] = asyncio.Queue()
        self.masks: asyncio.Queue[node_pb2.BatchMasks] = asyncio.Queue()
        self._nodes = nodes
        self._heartbeats = heartbeats
        self._settings = settings
        self._deliver = deliver
        self._identity, self._group_traffic = monitor.identity, monitor.group_traffic
        self._ranks = settings.ranks or (None,) * (len(nodes) + 1)
        self._wires = Wires.of(self._ranks)
        self._ports: dict[int, int] = {}  # where nodes listen for links, by their place in the pipeline
        self._over = False  # lost or closed: nothing more is delivered
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, progress: Progress | None, deadline: float) -> None:
        """See `GrpcLink.wire`. Whatever happens, `close` it in the end."""
        places = range(len(self._nodes))
        beats = zip(self._nodes, self._heartbeats, strict=True)
        await _together([await_loaded(node, heartbeat, progress, deadline) for node, heartbeat in beats])
        for index in reversed(places):
            await self._configure(index)
        if len(self._wires.stages[0]) > 1:
            self.group = await asyncio.to_thread(self._join)
        if self._wires.head:
            await asyncio.to_thread(self._link)
        streams = [self._send(), self._send_masks(), self._receive()] if self._wires.head else []
        work = [*streams, *(self._watch(index) for index in places)]
        self._tasks = [asyncio.create_task(coroutine) for coroutine in work]

    async def spans(self, record: bool) -> dict[str, list[Span]]:
        """See `GrpcLink.spans`."""
        answers = await asyncio.gather(*(heartbeat.client.spans(record) for heartbeat in self._heartbeats))
        return {node.name: spans for node, spans in zip(self._nodes, answers, strict=True)}

    async def close(self) -> None:
        """Ends the streams; nothing is delivered afterwards."""
        with self._delivering:
            self._over = True
        for link in (self.group, self.direct, self._results):
            if link:
                link.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _configure(self, index: int) -> None:
        settings, name, place = self._settings, self._nodes[index].name, index + 1
        following, before = self._wires.next(place), self._wires.previous(place)
        after = self._node(following) if following else NodeAddress("", "")
        stage = self._wires.stage(place)
        here = IN_GROUP if len(stage) > 1 else HERE
        request = node_pb2.ConfigureRequest(
            version=here.version,
            oldest_version=here.oldest,
            epoch=self.number,
            manifest_digest=settings.manifest_digest,
            n_slots=settings.n_slots,
            sequence_length=settings.sequence_length,
            kv_cache_dtype=settings.kv_cache_dtype or "",
            shards=settings.shards,
            next_address=after.address,
            next_node=after.id,
            next_port=self._ports[following] if following else 0,
            previous_node="" if before is None else self._id(before),
            group=self._members(stage) if len(stage) > 1 else (),
            rank=place - stage.start,
        )
        try:
            reply = await self._heartbeats[index].client.configure(request)
        except LinkError as error:
            raise LinkError(f"node {name} {error}", name) from None
        self._ports[place] = reply.link_port
        await self._heartbeats[index].poll()

    def _node(self, place: int) -> NodeAddress:
        """By its place in the pipeline, where the starter is 0."""
        return self._nodes[place - 1]

    def _id(self, place: int) -> str:
        return self._node(place).id if place else "starter"

    def _members(self, stage: range) -> list[node_pb2.GroupMember]:
        """The ranks of a stage. Those that are configured already have their ports."""
        members = []
        for place in stage:
            rank = self._ranks[place]
            assert rank is not None  # as all of a group have one
            host = host_and_port(self._node(place).address)[0] if place else ""
            member = node_pb2.GroupMember(
                node=self._id(place),
                host=host,
                port=self._ports.get(place, 0),
                first_shard=rank.first_shard,
                last_shard=rank.last_shard,
            )
            members.append(member)
        return members

    def _join(self) -> GroupLink:
        """Raises LinkError, naming the node, for a rank that cannot be linked."""
        rank = self._ranks[0]
        assert rank is not None  # as all of a group have one
        members, shares = codec.decode_group(self._members(self._wires.stages[0]), rank.n_shards)
        try:
            return GroupLink.join(
                0, members, shares, None, self._identity, self.number, JOIN_TIMEOUT_S, self._group_traffic
            )
        except LinkError as error:
            raise named(error, self._nodes) from None

    def _link(self) -> None:
        """Links the starter directly to the node behind it, and to the node with the head, where that can be."""
        traffic = self._monitor.traffic
        if connection := self._connect(Purpose.BATCHES, self._second):
            self.direct = DirectSender(connection, traffic, partial(self._lose_direct, self._second))
        if connection := self._connect(Purpose.RESULTS, self._head):
            ended, result = partial(self._lose_direct, self._head), node_pb2.BatchResult
            self._results = DirectReceiver(connection, result, self._take_result, ended, traffic)

    def _connect(self, purpose: Purpose, index: int) -> socket.socket | None:
        node = self._nodes[index]
        listening = Member(node.id, host_and_port(node.address)[0], self._ports[index + 1])
        return connect(purpose, "starter", listening, self._identity, self.number)

    @property
    def _second(self) -> int:
        """The index of the node that leads the second stage."""
        return self._wires.stages[1].start - 1

    @property
    def _head(self) -> int:
        """The index of the node that draws tokens."""
        return self._wires.head - 1

    async def _send(self) -> None:
        try:
            await self._heartbeats[self._second].client.send_batches(self.outbox)
        except LinkError as error:
            self._lose_link(self._nodes[self._second].name, error)

    async def _send_masks(self) -> None:
        try:
            await self._heartbeats[self._head].client.send_masks(self.masks)
        except LinkError as error:
            self._lose_link(self._nodes[self._head].name, error)

    async def _receive(self) -> None:
        ended = LinkError("it ended the stream of results")
        try:
            async for message in self._heartbeats[self._head].client.results(self.number):
                self._take_result(message)
        except LinkError as error:
            ended = error
        self._lose_link(self._nodes[self._head].name, ended)

    def _take_result(self, message: node_pb2.BatchResult) -> None:
        with self._delivering:
            if message.epoch == self.number and not self._over:
                self._deliver(codec.decode_result(message))

    def _lose_direct(self, index: int, reason: str | LinkError | None) -> None:
        """Reports that a direct link ended, and why, where that can be found. For the threads of links."""
        if not self._over:
            self._monitor.loop.begin(self._diagnose(index, str(reason or "the connection ended")))

    async def _diagnose(self, index: int, reason: str) -> None:
        name = self._nodes[index].name
        self._lose_link(name, await self._heartbeats[index].client.diagnosed(LinkError(reason, name)))

    async def _watch(self, index: int) -> None:
        """Notices that a node is silent, was started anew, or has lost the node after it."""
        name = self._nodes[index].name
        while True:
            beat = await self._heartbeats[index].next()
            if beat.lost:
                self._lose(LinkError(f"node {name} was silent for {MISSED_BEATS * HEARTBEAT_S:g} s", name))
            elif beat.answer and beat.answer.epoch != self.number:
                self._lose(LinkError(f"node {name} was started anew", name))
            elif beat.answer and beat.answer.next_lost:
                self._lose(self._broken(index, beat.answer))

    def _broken(self, index: int, answer: node_pb2.NodeStatus) -> LinkError:
        """What a node reports of a link to another one."""
        if answer.lost_node:
            return named(LinkError(answer.next_error, answer.lost_node), self._nodes)
        name, following = self._nodes[index].name, self._wires.next(index + 1)
        after = self._node(following).name if following else name
        return LinkError(f"the link from node {name} to node {after} broke: {answer.next_error}", after)

    def _lose_link(self, name: str, reason: LinkError) -> None:
        self._lose(LinkError(f"the link to node {name} broke: {reason}", name))

    def _lose(self, error: LinkError) -> None:
        with self._delivering:
            first, self._over = not self._over, True
        if first:
            self._deliver(error)


def named(error: LinkError, nodes: Sequence[NodeAddress]) -> LinkError:
    """The same error with a node's role where it has its id, as ranks do."""
    roles = {node.id: node.name for node in nodes}
    return LinkError(str(error), roles.get(error.node, error.node))


async def loaded_nodes(
    monitor: Monitor, nodes: Sequence[NodeAddress], progress: Progress | None, deadline: float
) -> list[node_pb2.NodeStatus]:
    """The status of every node, once all have loaded. Raises LinkError, naming the node, for one that does not."""
    heartbeats = [await monitor.watch(node) for node in nodes]
    beats = zip(nodes, heartbeats, strict=True)
    await _together([await_loaded(node, heartbeat, progress, deadline) for node, heartbeat in beats])
    return await _together([heartbeat.answer() for heartbeat in heartbeats])


async def await_loaded(node: NodeAddress, heartbeat: Heartbeat, progress: Progress | None, deadline: float) -> None:
    """Returns when a node has loaded. Raises LinkError, naming the node, if it does not until the deadline."""
    name = node.name
    while True:
        try:
            status = await heartbeat.answer()
        except LinkError as error:
            raise LinkError(f"node {name} does not answer: {error}", name) from None
        if progress and status.total_bytes:
            progress(name, status.done_bytes, status.total_bytes)
        if status.state == node_pb2.NodeStatus.FAILED:
            raise LinkError(f"node {name}: {status.error}", name)
        if status.state in (node_pb2.NodeStatus.WAITING, node_pb2.NodeStatus.RECEIVING):
            raise LinkError(f"node {name} was started anew, and has no weights yet", name)
        if status.state == node_pb2.NodeStatus.LOADED:
            return
        if time.monotonic() > deadline:
            raise LinkError(f"node {name} did not finish loading in time", name)
        await asyncio.sleep(LOADING_POLL_S)


async def _together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs them at the same time; the first error ends all."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
