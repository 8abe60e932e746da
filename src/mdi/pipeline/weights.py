"""A chunk's way from the starter's disk to a node's: sent in pieces, gone on with where it broke off.

Knows one file at each end, and no model. Files are read and written in threads; the event loops only pass pieces on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import grpc

from mdi.checkpoint.cache import CachedChunk
from mdi.checkpoint.manifest import ChunkEntry
from mdi.checkpoint.prepare import ByteProgress
from mdi.core.errors import CheckpointError, LinkError
from mdi.rpc import codec, node_pb2

T = TypeVar("T")
PIECE_BYTES = 2**18  # what arrived in part is sent again: on a slow link, little
PATIENT_OPTIONS = (  # for a link whose buffers hold seconds of data: a ping waits behind them
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


async def send_chunk(
    channel: grpc.aio.Channel, node: str, file: Path, entry: ChunkEntry, start: int, progress: ByteProgress
) -> None:
    """Sends a chunk's file from byte `start` on to a node that was offered it. progress: told (sent, all) bytes.

    Raises CheckpointError when the file here is not the manifest's any more, LinkError when the node is lost meanwhile
    or cannot keep what it is sent.
    """
    call = channel.stream_unary(
        codec.method("Weights"),
        request_serializer=codec.serialize,
        response_deserializer=lambda data: codec.parse(node_pb2.WeightsReply, data),
    )()
    with _opened(file, entry) as source:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the answer says why
            async for piece in _pieces(source, start):
                await call.write(piece)
                progress(piece.offset + len(piece.data), entry.size_bytes)
            await call.done_writing()
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            raise LinkError(f"the link to node {node} broke while it was sent its weights", node) from error
    if answer.error:
        raise LinkError(f"node {node}: {answer.error}", node)


@contextlib.contextmanager
def _opened(file: Path, entry: ChunkEntry) -> Iterator[FileIO]:
    try:
        with file.open("rb", buffering=0) as source:
            if source.seek(0, 2) != entry.size_bytes:
                raise CheckpointError(f"{file.name} changed since this server began: start it again")
            yield source
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read ({error.strerror}): run `mdi prepare` again") from None


async def _pieces(source: FileIO, start: int) -> AsyncIterator[node_pb2.WeightsPiece]:
    source.seek(start)
    while data := await _in_thread(source.read, PIECE_BYTES):
        yield node_pb2.WeightsPiece(offset=start, data=data)
        start += len(data)


class Intake:
    """A node's end: takes one chunk at a time; the starter that spoke last is the one that is heard."""

    def __init__(self) -> None:
        self.came_whole = False  # in one go: what is wrong with the chunk was wrong at the other end
        self._chunk: CachedChunk | None = None
        self._task: asyncio.Task[bool] | None = None

    @property
    def receiving(self) -> bool:
        return self._task is not None

    async def expect(self, chunk: CachedChunk) -> int:
        """Ends a transfer that goes on, and makes ready for a chunk; gives the bytes of it that are there.

        Raises CheckpointError when the disk has no place for it.
        """
        await self.stop()
        await asyncio.to_thread(chunk.prepare)
        self._chunk, self.came_whole = chunk, False
        return chunk.have_bytes

    async def receive(self, pieces: AsyncIterator[node_pb2.WeightsPiece], progress: ByteProgress) -> CachedChunk | None:
        """Takes the pieces of the expected chunk; the chunk when all of it is there, None when it stopped before.

        progress: told (there, all) bytes. Raises CheckpointError when the disk refuses.
        """
        chunk = self._chunk
        if chunk is None or self._task:
            raise CheckpointError("no weights are expected: offer them first")
        began_bytes = chunk.have_bytes
        task = self._task = asyncio.create_task(_append(chunk, pieces, progress))
        try:
            await asyncio.wait([task])
        finally:  # the call may be over before the task
            await self._end(task)
        if task.cancelled() or not task.result():
            return None
        self.came_whole = began_bytes == 0
        return chunk

    async def stop(self) -> None:
        """Ends a transfer that goes on. What arrived stays."""
        if self._task:
            await self._end(self._task)

    async def _end(self, task: asyncio.Task[bool]) -> None:
        task.cancel()
        await asyncio.wait([task])
        if self._task is task:
            self._task = None


async def _append(chunk: CachedChunk, pieces: AsyncIterator[node_pb2.WeightsPiece], progress: ByteProgress) -> bool:
    """Whether all of the chunk is there in the end."""
    there, size = chunk.have_bytes, chunk.entry.size_bytes
    with chunk.growing() as file:
        progress(there, size)
        async for piece in pieces:
            if piece.offset != there or there + len(piece.data) > size:
                raise CheckpointError("pieces of weights arrived that do not follow each other")
            await _in_thread(_write, file, piece.data)
            there += len(piece.data)
            progress(there, size)
    if there == size:
        chunk.finish()
    return there == size


def _write(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """`asyncio.to_thread` for a file: whoever is cancelled closes it only when the thread has let go of it."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
