"""The starter's view of all nodes: one heartbeat a node, and the event loop that all calls to nodes run in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, replace

from mdi.cluster.loop_thread import LoopThread
from mdi.cluster.node_client import RPC_TIMEOUT_S, NodeAddress, NodeClient
from mdi.core.errors import LinkError
from mdi.core.status import NodeState, NodeStatus
from mdi.kernels.library import kernels_in_use
from mdi.rpc import node_pb2
from mdi.rpc.channel import HEARTBEAT_S, MISSED_BEATS
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic

log = logging.getLogger(__name__)

STATES: dict[int, NodeState] = {
    node_pb2.NodeStatus.LOADING: "loading",
    node_pb2.NodeStatus.LOADED: "loaded",
    node_pb2.NodeStatus.FAILED: "failed",
    node_pb2.NodeStatus.WAITING: "waiting",
    node_pb2.NodeStatus.RECEIVING: "receiving",
}


@dataclass(frozen=True)
class Beat:
    """One poll of a node. answer: None when it was missed; `error` then has the cause, not yet diagnosed.

    asked_s: by time.monotonic. missed: how many beats in a row were, this one included.
    """

    asked_s: float
    round_trip_s: float
    answer: node_pb2.NodeStatus | None
    error: LinkError | None = None
    missed: int = 0

    @property
    def lost(self) -> bool:
        """Whether the node is taken for lost."""
        return self.missed >= MISSED_BEATS


class Heartbeat:
    """Polls one node's status every second, for all who need it. Belongs to the monitor's loop, except `shown`.

    A poll that is not answered in time is not missed when the node sent its status by itself meanwhile: on a slow link
    the question waits behind the data that this side sends.
    """

    def __init__(self, client: NodeClient) -> None:
        self.client = client
        self.last: Beat | None = None
        self._answered: Beat | None = None
        self._changed = asyncio.Event()  # another one each time it is set
        self._sent: tuple[float, node_pb2.NodeStatus] | None = None  # what the node sent by itself, and when
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._listen())]

    async def poll(self, timeout_s: float = HEARTBEAT_S, *, wait_for_ready: bool = False) -> Beat:
        """One beat now; the next in turn follows a second later. wait_for_ready: for a connection, if there is none."""
        asked_s, answer, failure, missed = time.monotonic(), None, None, 0
        try:
            answer = await self.client.status(timeout_s, wait_for_ready=wait_for_ready, diagnose=False)
        except LinkError as error:
            if self._sent and self._sent[0] > asked_s:
                answer = self._sent[1]
            else:
                failure, missed = error, (self.last.missed if self.last else 0) + 1
        beat = self.last = Beat(asked_s, time.monotonic() - asked_s, answer, failure, missed)
        if answer:
            if self._answered is None:
                warn_of_other_kernels(self.client.node.name, answer)
            self._answered = beat
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        return beat

    async def answer(self) -> node_pb2.NodeStatus:
        """The node's status now. Raises LinkError, with the reason, when there is none."""
        beat = await self.poll()
        if beat.error:
            error = await self.client.diagnosed(beat.error)
            if error is not beat.error:
                raise error
            beat = await self.poll(RPC_TIMEOUT_S, wait_for_ready=True)  # nothing is wrong any more
        if beat.answer is None:
            raise beat.error or LinkError("no answer", self.client.node.name)
        return beat.answer

    async def usable(self) -> node_pb2.NodeStatus:
        """The same of a node that can be given work. Raises LinkError when it is leaving, or its chunk is no good."""
        status = await self.answer()
        if status.leaving:
            raise LinkError("was told to end", self.client.node.name)
        if status.state == node_pb2.NodeStatus.FAILED:
            raise LinkError(status.error, self.client.node.name)
        return status

    async def next(self) -> Beat:
        """Waits for a beat that begins after now."""
        called_s = time.monotonic()
        while self.last is None or self.last.asked_s < called_s:
            await self._changed.wait()
        return self.last

    def shown(self, name: str, epoch: int | None = None) -> NodeStatus:
        """What was last heard of the node, under the name of its role; from any thread.

        epoch: a node that has loaded is shown as ready when it is wired in this one.
        """
        last, answer = self._answered, self._answered.answer if self._answered else None
        if last is None or answer is None:
            node = self.client.node
            return NodeStatus(name, "lost", 0, 0, "", "", 0, 0, 0.0, 0, 0, spare=_spare(node.id), node=node.id)
        status = _node_status(answer, name, last.round_trip_s)
        if self.last and self.last.lost:
            return replace(status, state="lost", error=str(self.last.error or ""))
        return replace(status, state="ready") if status.state == "loaded" and answer.epoch == epoch else status

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.close()

    async def _run(self) -> None:
        while True:
            wait_s = self.last.asked_s + HEARTBEAT_S - time.monotonic() if self.last else 0.0
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            try:
                await self.poll()
            except Exception:
                log.exception("node %s could not be polled", self.client.node.name)
                await asyncio.sleep(HEARTBEAT_S)

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(LinkError):
                async for status in self.client.watch():
                    if status.node == self.client.node.id:
                        self._sent = time.monotonic(), status
            await asyncio.sleep(HEARTBEAT_S)


def warn_of_other_kernels(name: str, status: node_pb2.NodeStatus) -> None:
    """Logs where a CPU's kernels differ from those here: their results differ in the last bits."""
    here = kernels_in_use("cpu")
    if status.device.startswith("cpu") and status.kernels not in ("", here):
        log.warning(
            "node %s computes with %s, this machine with %s: an answer that goes on elsewhere after a loss may differ; "
            "MDI_CPU=... sets one for all",
            name,
            status.kernels,
            here,
        )


class Monitor:
    """The heartbeats of all nodes, and the thread that calls them. identity: encrypts all links; None: in the clear."""

    def __init__(self, identity: Identity | None) -> None:
        self.identity = identity
        self.traffic = Traffic()  # batches sent, results received
        self.group_traffic = Traffic()  # of the starter with the other ranks of its stage
        self.loop = LoopThread("mdi-cluster")
        self._heartbeats: dict[str, Heartbeat] = {}
        self._closed = False

    async def watch(self, node: NodeAddress) -> Heartbeat:
        """The heartbeat of a node, begun if it is new or has moved to another address."""
        known = self._heartbeats.get(node.id)
        if known and known.client.node.address == node.address:
            return known
        heartbeat = self._heartbeats[node.id] = Heartbeat(NodeClient(node, self.identity, self.traffic))
        if known:
            await known.close()
        return heartbeat

    async def forget(self, node: NodeAddress) -> None:
        """Ends the heartbeat of a node that does not exist after all."""
        if heartbeat := self._heartbeats.pop(node.id, None):
            await heartbeat.close()

    def heartbeat(self, node: NodeAddress) -> Heartbeat | None:
        """The heartbeat of a node, if it is watched; from any thread, to read what was last heard."""
        return self._heartbeats.get(node.id)

    def close(self) -> None:
        """Ends all polls and the thread. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self.loop.call(self._close_all())
            self.loop.close()

    async def _close_all(self) -> None:
        for heartbeat in self._heartbeats.values():
            await heartbeat.close()


def _node_status(status: node_pb2.NodeStatus, name: str, round_trip_s: float) -> NodeStatus:
    return NodeStatus(
        name=name,
        state="leaving" if status.leaving else STATES[status.state],
        first_layer=status.first_layer,
        last_layer=status.last_layer,
        dtype=status.dtype,
        device=status.device,
        kernels=status.kernels,
        resident_bytes=status.resident_bytes,
        pid=status.pid,
        busy_share=status.busy_share,
        sent_bytes=status.sent_bytes,
        received_bytes=status.received_bytes,
        group_received_bytes=status.group_received_bytes,
        steps=status.steps,
        step_s=status.step_s,
        round_trip_s=round_trip_s,
        spare=_spare(status.node),
        node=status.node,
        error=status.error,
    )


def _spare(node: str) -> str:
    """The id of a spare; empty for another node."""
    return node if node.startswith("spare") else ""
