"""The receiving of a chunk: pieces are appended to a file, from the byte on that is missing. Written in threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from io import FileIO

from mdi.core.errors import CheckpointError
from mdi.core.progress import Progress
from mdi.core.threads import in_thread
from mdi.node.store import StoredChunk
from mdi.rpc import node_pb2


class Intake:
    """Receives one chunk at a time: a new offer ends the transfer of the one before."""

    def __init__(self) -> None:
        self.came_whole = False  # in one transfer: damage in the chunk was there at the other end
        self._chunk: StoredChunk | None = None
        self._task: asyncio.Task[bool] | None = None

    @property
    def receiving(self) -> bool:
        return self._task is not None

    async def expect(self, chunk: StoredChunk) -> int:
        """Ends a transfer that goes on, and prepares for a chunk; returns the bytes of it that are there.

        Raises CheckpointError when the disk has no room for it.
        """
        await self.stop()
        await asyncio.to_thread(chunk.prepare)
        self._chunk, self.came_whole = chunk, False
        return chunk.have_bytes

    async def receive(self, pieces: AsyncIterator[node_pb2.WeightsPiece], progress: Progress) -> StoredChunk | None:
        """Takes the pieces of the expected chunk; the chunk when all of it is there, None when it stopped before.

        progress: called with bytes. Raises CheckpointError when the disk refuses.
        """
        chunk = self._chunk
        if chunk is None or self._task:
            raise CheckpointError("no weights are expected: offer them first")
        began_bytes = chunk.have_bytes
        task = self._task = asyncio.create_task(_append(chunk, pieces, progress))
        try:
            await asyncio.wait([task])
        finally:  # the call may end before the task
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


async def _append(chunk: StoredChunk, pieces: AsyncIterator[node_pb2.WeightsPiece], progress: Progress) -> bool:
    """Appends pieces to the chunk's file; whether all of it is there at the end."""
    there, size = chunk.have_bytes, chunk.entry.size_bytes
    with chunk.growing() as file:
        progress("receiving weights", there, size)
        async for piece in pieces:
            if piece.offset != there or there + len(piece.data) > size:
                raise CheckpointError("pieces of weights arrived that do not follow each other")
            await in_thread(_write, file, piece.data)
            there += len(piece.data)
            progress("receiving weights", there, size)
    if there == size:
        await in_thread(chunk.finish)
    return there == size


def _write(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
