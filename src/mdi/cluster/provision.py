"""Provisioning: has a node hold the chunk of its role, and uploads what the node lacks of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from io import FileIO
from pathlib import Path

from mdi.checkpoint.manifest import ChunkEntry, chunk_file
from mdi.checkpoint.prepare import Chunks
from mdi.cluster.node_client import NodeClient
from mdi.core.errors import CheckpointError, LinkError
from mdi.core.progress import Progress
from mdi.core.threads import in_thread
from mdi.rpc import node_pb2

PIECE_BYTES = 2**18  # what arrived in part is sent again: on a slow link, little
CHECK_POLL_S = 0.1


class DamagedChunkError(LinkError):
    """The chunk's file here is not what the manifest says: to send it again would not help."""


async def provision(
    client: NodeClient, role: str, chunks: Chunks, note: Callable[[str], None], progress: Progress | None
) -> None:
    """Returns when the node has the chunk of its role, and loads it or has loaded it.

    note: called with what the node does. progress: called with (what is sent, bytes sent, bytes in all).
    Raises LinkError when this does not succeed now and may later, DamagedChunkError and CheckpointError when it cannot.
    """
    entry = chunks.manifest.chunk(chunk_file(role))
    file = chunks.file(role)
    while not (reply := await client.offer(chunks.manifest, role)).ready:
        if reply.damaged:
            raise DamagedChunkError(
                f"node {role} was sent weights that are not what the manifest says ({reply.error}): "
                f"is {str(file)!r} damaged here? Run `mdi prepare` again",
                role,
            )
        if reply.error:
            raise LinkError(reply.error, role)
        if reply.wanted:
            note("receives its weights")
            await _upload(client, role, file, entry, reply.have_bytes, progress)
        else:
            note("checks the weights it has")
            await asyncio.sleep(CHECK_POLL_S)
    note("has its weights")


async def _upload(
    client: NodeClient, role: str, file: Path, entry: ChunkEntry, start: int, progress: Progress | None
) -> None:
    """Sends a chunk's file from byte `start` on. Raises CheckpointError when it is not the manifest's any more."""

    def sent(piece: node_pb2.WeightsPiece) -> None:
        if progress:
            progress(f"weights to {role}", piece.offset + len(piece.data), entry.size_bytes)

    with _opened(file, entry) as source:
        await client.send_weights(_pieces(source, start), sent)


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
    while data := await in_thread(source.read, PIECE_BYTES):
        yield node_pb2.WeightsPiece(offset=start, data=data)
        start += len(data)
