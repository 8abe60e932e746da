"""Encodes images on a node that has the vision tower and nothing else. While that node is away, images wait.

The node stands beside the pipeline: no other node waits for it, and nothing is wired anew when it is lost. The image
that it was encoding is sent again when it is back with its weights.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from torch import Tensor

from mdi.checkpoint.prepare import Chunks
from mdi.cluster.monitor import Heartbeat, Monitor
from mdi.cluster.node_client import NodeAddress, NodeClient
from mdi.cluster.provision import DamagedChunkError, provision
from mdi.core.dtypes import parse_dtype
from mdi.core.errors import LinkError, MDIError
from mdi.core.status import NodeStatus
from mdi.core.tracing import Span
from mdi.layers.rope import Grid
from mdi.rpc import node_pb2
from mdi.rpc.channel import MISSED_BEATS

log = logging.getLogger(__name__)

RETRY_S = 0.25

Encoded = Tensor | MDIError
"""Embeddings, [tokens, embedding_width], or why there are none."""


class RemoteEncoder:
    """The starter's end. width: of an embedding.

    timeout_s: how long images wait for a node that is away, from its loss or from their request's arrival on: images
    that wait together fail together.
    """

    def __init__(self, node: NodeAddress, monitor: Monitor, chunks: Chunks, width: int, timeout_s: float) -> None:
        self._node = node
        self._monitor = monitor
        self._chunks = chunks
        self._dtype = parse_dtype(chunks.manifest.dtype)
        self._width = width
        self._timeout_s = timeout_s
        self._losses = 0
        self._lost_s: float | None = None  # since when the node is away, on the monotonic clock
        self._reason = ""
        self._heartbeat: Heartbeat = monitor.loop.call(monitor.watch(node))

    def encode(self, rows: Tensor, grid: Grid, arrived_s: float, done: Callable[[Encoded], None]) -> Future[Encoded]:
        """Begins to encode an image or video. rows: float32 [patches, patch_elements]; arrived_s: when its request
        arrived, on the monotonic clock; done: called with the outcome, in the monitor's thread.

        Returns what the caller can cancel.
        """

        async def work() -> Encoded:
            try:
                return await self._encode(await asyncio.to_thread(rows.to, self._dtype), grid, arrived_s)
            except MDIError as error:
                return error
            except Exception:
                log.exception("an image could not be encoded")
                return LinkError("an image could not be encoded; the server's log has the details", self._node.name)

        def end(future: Future[Encoded]) -> None:
            unwanted = LinkError("the image is not wanted any more", self._node.name)
            done(unwanted if future.cancelled() else future.result())

        future = self._monitor.loop.begin(work())
        future.add_done_callback(end)
        return future

    def status(self) -> NodeStatus:
        """What was last heard of the node."""
        return replace(self._heartbeat.shown(self._node.name, epoch=0), restarts=self._losses)

    def spans(self, record: bool) -> list[Span]:
        """What the node did since the last call. record: whether to note more. Raises LinkError when it is away."""
        return self._monitor.loop.call(self._heartbeat.client.spans(record))

    async def _encode(self, rows: Tensor, grid: Grid, arrived_s: float) -> Tensor:
        """Tries again and again, until the time is over."""
        deadline_s = math.inf
        while True:
            if self._lost_s is not None:
                deadline_s = min(deadline_s, max(self._lost_s, arrived_s) + self._timeout_s)
                await self._until_ready(deadline_s)
            try:
                return await self._encode_once(rows, grid)
            except LinkError as error:
                self._reason = str(error)
            self._lost_s = time.monotonic()
            self._losses += 1
            log.warning("node %s did not encode an image (%s); trying again", self._node.name, self._reason)

    async def _encode_once(self, rows: Tensor, grid: Grid) -> Tensor:
        async with NodeClient(self._node, self._monitor.identity) as client:
            digest = self._chunks.manifest.digest
            encoding = asyncio.create_task(client.encode(digest, rows, grid, self._width))
            silence = asyncio.create_task(self._silence())
            try:
                await asyncio.wait((encoding, silence), return_when=asyncio.FIRST_COMPLETED)
                if not encoding.done():
                    raise LinkError(f"it was silent {MISSED_BEATS} times", self._node.name)
                return await encoding
            finally:
                encoding.cancel()
                silence.cancel()
                await asyncio.wait((encoding, silence))

    async def _silence(self) -> None:
        """Until the node is lost: a frozen one does not break a stream that waits for room to send."""
        while not (await self._heartbeat.next()).lost:
            pass

    async def _until_ready(self, deadline_s: float) -> None:
        """Until the node is back and has loaded its weights. Raises LinkError when that takes too long."""
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                while not await self._is_ready():
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise LinkError(
                f"the image was not encoded within {self._timeout_s:g} s: {self._node.name}: {self._reason}",
                self._node.name,
            ) from None
        self._lost_s = None

    async def _is_ready(self) -> bool:
        """Whether the node has loaded its weights; sends them if it lacks them. Raises DamagedChunkError."""
        try:
            await self._heartbeat.usable()
            async with NodeClient(self._node, self._monitor.identity) as client:
                await provision(client, self._node.name, self._chunks, lambda _: None, None)
            return (await self._heartbeat.usable()).state == node_pb2.NodeStatus.LOADED
        except DamagedChunkError:
            raise
        except LinkError as error:
            self._reason = str(error)
            return False
