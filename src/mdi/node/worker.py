"""The compute thread of a node, and one epoch: its stage, the messages to send, the links to other nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import socket
import threading

import grpc
from torch import Tensor

from mdi.core.allocator import next_item
from mdi.core.batch import Batch
from mdi.core.errors import LinkError, MDIError
from mdi.models.stage import Stage
from mdi.models.weights import LoadedStage
from mdi.node.masks import MaskInbox
from mdi.node.membership import Membership
from mdi.node.settings import NodeSettings
from mdi.rpc import codec, node_pb2
from mdi.rpc.channel import CHANNEL_OPTIONS, KEEPALIVE_OPTIONS, open_channel, spoken
from mdi.rpc.diagnose import diagnose
from mdi.rpc.direct_link import DirectListener, DirectReceiver, DirectSender, Take, connect
from mdi.rpc.group_join import Member, Purpose
from mdi.rpc.sockets import host_and_port
from mdi.rpc.traffic import Traffic, node_stub

log = logging.getLogger(__name__)

Work = tuple[Batch, Tensor] | node_pb2.Failure | Membership
Outgoing = node_pb2.BatchPiece | node_pb2.BatchResult


class Epoch:
    """One epoch of a node. A batch belongs to the epoch it arrived in: when that is over, its outcome is dropped.

    role: what failures are reported under. previous_node: the name in the certificate of the node that sends batches.
    """

    def __init__(self, number: int, stage: Stage, role: str, previous_node: str) -> None:
        self.number = number
        self.stage = stage
        self.previous_node = previous_node
        self.outgoing: asyncio.Queue[Outgoing | None] = asyncio.Queue()  # None ends it
        self.masks = MaskInbox()
        self.next_lost = False
        self.next_error = ""
        self.lost_node = ""  # the id of a rank that was lost; empty for the next node
        self._role = role
        self._closing = False
        self._channel: grpc.aio.Channel | None = None
        self._sender: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._diagnosing: asyncio.Task[None] | None = None
        self.membership: Membership | None = None  # in a group
        self._listener: DirectListener | None = None
        self.direct: DirectSender | None = None  # in place of `outgoing`

    def listen(self, settings: NodeSettings, traffic: Traffic, arrivals: Arrivals) -> int:
        """Opens a port for direct links from the node before, and from the starter where this node has the head.

        Raises LinkError when it cannot be opened.
        """

        def take_batches(connection: socket.socket, answer: bytes) -> None:
            # until the node before ends the connection, as it does with the stream
            DirectReceiver(connection, node_pb2.BatchPiece, arrivals.add, arrivals.ended, traffic, answer)

        def take_results(connection: socket.socket, answer: bytes) -> None:
            self.direct = DirectSender(connection, traffic, lambda _: None)  # the starter notices the end
            self.direct.write(answer)  # now that results go this way

        callers: dict[Purpose, tuple[str, Take]] = {Purpose.BATCHES: (self.previous_node, take_batches)}
        if self.stage.spec.head:
            callers[Purpose.RESULTS] = "starter", take_results
        self._listener = DirectListener(settings.name, settings.link_place, settings.identity, self.number, callers)
        return self._listener.port

    async def open(self, settings: NodeSettings, traffic: Traffic, request: node_pb2.ConfigureRequest) -> None:
        """Starts to send to the next node: directly, or `outgoing` where that cannot be."""
        self._loop = asyncio.get_running_loop()
        self._next = request.next_address, request.next_node, settings.identity
        self._channel = open_channel(*self._next, (*CHANNEL_OPTIONS, *KEEPALIVE_OPTIONS))
        call = node_stub(self._channel, traffic).Batches()
        self._sender = asyncio.create_task(self._send(call))
        self._watcher = asyncio.create_task(self._watch(call))
        following = Member(request.next_node, host_and_port(request.next_address)[0], request.next_port)
        own, identity = settings.name, settings.identity
        connection = await asyncio.to_thread(connect, Purpose.BATCHES, own, following, identity, self.number)
        if connection:
            self.direct = DirectSender(connection, traffic, self._lose_next_soon)

    async def close(self) -> None:
        """Ends the links to other nodes, or the reading of `outgoing`."""
        self._closing = True
        if self.membership:
            self.membership.close()
        if self._listener:
            self._listener.close()
        if self.direct:
            self.direct.close()
        self.masks.close()
        self.outgoing.put_nowait(None)
        if self._sender and self._channel:
            self._sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sender
            await self._channel.close()  # which ends the watcher, too

    def outcome(self, work: Work) -> list[Outgoing]:
        """Computes a batch, and makes the messages that carry what came of it. For the compute thread."""
        try:
            if isinstance(work, tuple):
                return self._computed(*work)
            if isinstance(work, Membership):
                self._take_part(work)
                return []
            failure = work
        except LinkError as error:
            if error.node:
                self.lose(error)
                return []
            log.warning("%s", error)
            failure = self.failure(error)
        except Exception as error:
            log.exception("a batch could not be computed")
            failure = self.failure(error)
        if self.stage.spec.head:
            return [node_pb2.BatchResult(epoch=self.number, failure=failure)]
        return [node_pb2.BatchPiece(epoch=self.number, failure=failure)]

    def _computed(self, batch: Batch, hidden: Tensor) -> list[Outgoing]:
        out = self.stage.run(batch, hidden)
        if not self.stage.spec.head:
            return list(codec.encode_batch(batch.beyond(self.stage.spec.last_layer), out, self.number))
        result = self.stage.sample(self.masks.complete(batch), out)
        assert result is not None  # only ranks that follow draw no tokens
        return [codec.encode_result(result, self.number)]

    def _take_part(self, membership: Membership) -> None:
        """Joins the group. A rank that follows then computes what the leader does, to the end of the epoch."""
        self.stage.group = group = membership.join()
        try:
            while not group.rank.leads:
                batch, hidden = group.follow()
                out = self.stage.run(batch, hidden)
                if self.stage.spec.head:
                    self.stage.sample(batch, out)
        except Exception as error:
            if not (isinstance(error, LinkError) and error.node):  # another rank is lost, and this one is not at fault
                membership.close()  # by which the others notice
            raise

    def lose(self, error: LinkError) -> None:
        """Reports that a rank of the group is gone, which the error names. Says nothing of the end of the epoch."""
        if self._closing:
            return
        log.error("%s", error)
        self.lost_node, self.next_error = error.node, str(error)
        self.next_lost = True

    def failure(self, error: Exception) -> node_pb2.Failure:
        """What is passed on instead of a batch."""
        text = str(error) if isinstance(error, MDIError) else "it could not compute a batch; its log has the details"
        return node_pb2.Failure(node=self._role, message=text)

    async def _send(self, call: grpc.aio.StreamStreamCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while (message := await self.outgoing.get()) is not None:
                await call.write(message)

    async def _watch(self, call: grpc.aio.StreamStreamCall) -> None:
        """Until the stream breaks: writes alone do not notice that an idle one did."""
        try:
            reason = "it ended the stream"
            async for reply in spoken(call):
                reason = reply.error or reason
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name.lower()
        except LinkError as error:
            reason = str(error)
        self._lose_next(reason)

    def _lose_next_soon(self, reason: str) -> None:
        """The same as `_lose_next`, from any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._lose_next, reason)

    def _lose_next(self, reason: str) -> None:
        if not (self._closing or self.next_lost):
            self.next_lost, self.next_error = True, reason
            self._diagnosing = asyncio.create_task(self._diagnose(reason))

    async def _diagnose(self, reason: str) -> None:
        address, name, _ = self._next
        found = await asyncio.to_thread(diagnose, *self._next)
        log.error("the link to node %s at %s broke: %s", name, address, found or f"{reason}; the node answers, though")
        self.next_error = found or reason


class Arrivals:
    """Batches of one epoch, on their way to the compute thread: from pieces, by whatever way these come."""

    def __init__(self, worker: Worker, epoch: Epoch, loaded: LoadedStage) -> None:
        self._worker, self._epoch = worker, epoch
        self._decoder = codec.BatchDecoder(loaded.config.hidden_size, loaded.dtype)

    def add(self, piece: node_pb2.BatchPiece) -> None:
        """Raises LinkError for a piece that does not fit."""
        if piece.epoch != self._epoch.number:
            return
        if piece.HasField("failure"):
            self._worker.put(self._epoch, piece.failure)
        elif (work := self._decoder.add(piece)) is not None:
            self._worker.put(self._epoch, work)

    def ended(self, error: LinkError | None) -> None:
        """Passes on why no more can be read. None: the node before ended it."""
        if error:
            self._worker.put(self._epoch, self._epoch.failure(error))


class Worker:
    """Computes the batches of the current epoch in a thread of its own, in order of arrival.

    The event loop sets `epoch`; the thread reads it.
    """

    def __init__(self) -> None:
        self.epoch: Epoch | None = None
        self._arrived: queue.SimpleQueue[tuple[Epoch, Work] | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Starts the thread; messages go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="mdi-compute", daemon=True).start()

    def put(self, epoch: Epoch, work: Work) -> None:
        """Adds a batch of an epoch, or a failure to pass on."""
        self._arrived.put((epoch, work))

    async def end_epoch(self) -> None:
        """Drops what is in flight; there is no epoch until the next one is set."""
        epoch, self.epoch = self.epoch, None
        if epoch:
            await epoch.close()

    async def stop(self) -> None:
        """Ends the epoch and the thread, the latter after the batch that it computes."""
        self._arrived.put(None)
        await self.end_epoch()

    def _run(self) -> None:
        while self._serve(next_item(self._arrived)):  # keeps no reference to an old epoch while it waits
            pass

    def _serve(self, item: tuple[Epoch, Work] | None) -> bool:
        """Computes one batch, or drops it when its epoch is over; False at the end."""
        if item is None:
            return False
        epoch, work = item
        if epoch is self.epoch:
            for message in epoch.outcome(work):
                if epoch.direct:
                    epoch.direct.send(message)
                    continue
                with contextlib.suppress(RuntimeError):  # the event loop has ended, and the process ends
                    self._loop.call_soon_threadsafe(epoch.outgoing.put_nowait, message)
        return True
