"""A node that has the vision tower and nothing else: images are encoded there, and while it is away they wait.

Beside the pipeline: nobody else waits for it, and nothing is wired anew when it is lost. What it was encoding is sent
again as soon as it is back with its weights.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import grpc
import torch
from torch import Tensor

from mdi.checkpoint.prepare import Chunks
from mdi.cluster.link import NodeAddress, node_status
from mdi.cluster.loop_thread import LoopThread
from mdi.cluster.node_client import POLL_S, Visit, Visitor
from mdi.core.dtypes import parse_dtype
from mdi.core.errors import LinkError, MDIError
from mdi.core.status import NodeStatus
from mdi.core.tracing import Span
from mdi.layers.rope import Grid
from mdi.rpc import codec, node_pb2
from mdi.rpc.channel import CHANNEL_OPTIONS, KEEPALIVE_OPTIONS, MISSED_BEATS, open_channel
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic, node_stub

log = logging.getLogger(__name__)

Encoded = Tensor | MDIError
"""Embeddings, [tokens, hidden_size], or why there are none."""


class RemoteEncoder:
    """The starter's end. Its own thread talks to the node, and looks after it every second.

    timeout_s: how long an image waits for a node that is away.
    """

    def __init__(
        self, node: NodeAddress, identity: Identity | None, chunks: Chunks, width: int, timeout_s: float
    ) -> None:
        self._node = node
        self._identity = identity
        self._digest = chunks.manifest.digest
        self._dtype = parse_dtype(chunks.manifest.dtype)
        self._width = width
        self._timeout_s = timeout_s
        self._visitor = Visitor(identity, chunks, None)
        self._traffic = Traffic()
        self._seen = NodeStatus(node.name, "lost", 0, 0, "", "", 0, 0, 0.0, 0, 0)
        self._losses = 0
        self._silence = asyncio.Event()  # another one each time it is set
        self._thread = LoopThread("mdi-vision")
        self._tasks = {self._thread.begin(self._watch())}

    @property
    def traffic(self) -> Traffic:
        """Bytes of patch rows sent and of embeddings received."""
        return self._traffic

    def encode(self, rows: Tensor, grid: Grid, done: Callable[[Encoded], None]) -> None:
        """Begins to have an image or video encoded. rows: float32 [patches, patch_elements]; done: told the outcome,
        in the thread of this object.
        """

        async def work() -> None:
            try:
                done(await self._encode(rows.to(self._dtype), grid))
            except MDIError as error:
                done(error)
            except Exception:
                log.exception("an image could not be encoded")
                done(LinkError("an image could not be encoded; the server's log has the details", self._node.name))

        task = self._thread.begin(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def status(self) -> NodeStatus:
        """As last heard of it, a second ago or so."""
        return replace(self._seen, restarts=self._losses)

    def spans(self, record: bool) -> list[Span]:
        """What the node did since it was last asked. record: whether to note more. Raises LinkError when it is away."""
        return self._thread.call(self._visitor.spans(self._node, record))

    def close(self) -> None:
        """Ends the thread; the node stays. Safe to call twice."""
        self._thread.close()

    async def _encode(self, rows: Tensor, grid: Grid) -> Tensor:
        """Again and again, until it is done or the time is over."""
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            try:
                return await self._encode_once(rows, grid)
            except (LinkError, grpc.aio.AioRpcError) as error:
                reason = _said(error)
            self._losses += 1
            log.warning("node %s did not encode an image (%s); trying again", self._node.name, reason)
            await self._until_ready(deadline_s, reason)

    async def _encode_once(self, rows: Tensor, grid: Grid) -> Tensor:
        options = (*CHANNEL_OPTIONS, *KEEPALIVE_OPTIONS)
        channel = open_channel(self._node.address, self._node.certificate, self._identity, options)
        encoding = asyncio.create_task(encode_there(channel, self._digest, rows, grid, self._width, self._traffic))
        silence = asyncio.create_task(self._silence.wait())
        try:
            await asyncio.wait((encoding, silence), return_when=asyncio.FIRST_COMPLETED)
            if not encoding.done():
                raise LinkError(f"it was silent {MISSED_BEATS} times", self._node.name)
            return await encoding
        finally:
            encoding.cancel()
            silence.cancel()
            await channel.close()

    async def _until_ready(self, deadline_s: float, reason: str) -> None:
        """Until the node is back with its weights. Raises LinkError when that takes too long."""

        def note(_there: bool, text: str) -> None:
            nonlocal reason
            reason = text

        while time.monotonic() < deadline_s:
            if await self._visitor.visit(self._node, note) is Visit.READY:
                await asyncio.sleep(POLL_S / 10)  # it may still be loading
                return
            await asyncio.sleep(POLL_S / 4)
        raise LinkError(
            f"the image was not encoded within {self._timeout_s:g} s: {self._node.name}: {reason}", self._node.name
        )

    async def _watch(self) -> None:
        """Looks after it. A frozen node breaks no stream that waits for room to send: silence has to."""
        missed = 0
        while True:
            asked_s = time.monotonic()
            status = await self._visitor.look(self._node)
            if isinstance(status, str):
                self._seen = replace(self._seen, state="lost")
                missed += 1
                if missed % MISSED_BEATS == 0:
                    self._silence.set()
                    self._silence = asyncio.Event()
            else:
                missed = 0
                seen = node_status(status, self._node.name, time.monotonic() - asked_s)
                self._seen = replace(seen, state="ready") if seen.state == "loaded" else seen
            await asyncio.sleep(POLL_S)


def _said(error: LinkError | grpc.aio.AioRpcError) -> str:
    return str(error) if isinstance(error, LinkError) else "the link broke: did it end?"


async def encode_there(
    channel: grpc.aio.Channel, digest: str, rows: Tensor, grid: Grid, width: int, traffic: Traffic
) -> Tensor:
    """Has a vision node encode one image or video. rows: in the dtype of its weights -> [tokens, width] in the same.

    digest: of the manifest that its weights are of. Raises LinkError when it cannot, AioRpcError when it is lost.
    """
    data = bytearray()
    async for piece in node_stub(channel, traffic).Encode(_row_pieces(digest, rows, grid)):
        if codec.received(piece).error:
            raise LinkError(piece.error)
        data += piece.data
    if not data or len(data) % (width * rows.itemsize):
        raise LinkError(f"{len(data)} bytes of embeddings arrived, of {width} numbers a token")
    return torch.frombuffer(data, dtype=rows.dtype).view(-1, width)


async def _row_pieces(digest: str, rows: Tensor, grid: Grid) -> AsyncIterator[node_pb2.EncodePiece]:
    first = True
    for data in codec.pieces(rows):
        yield (
            node_pb2.EncodePiece(manifest_digest=digest, grid=grid, data=data)
            if first
            else node_pb2.EncodePiece(data=data)
        )
        first = False
