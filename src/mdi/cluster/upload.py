"""Uploads a chunk's file to a node, from the byte on that the node lacks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from io import FileIO
from pathlib import Path

import grpc

from mdi.checkpoint.manifest import ChunkEntry
from mdi.core.errors import CheckpointError, LinkError
from mdi.core.progress import Progress
from mdi.rpc import codec, node_pb2
from mdi.rpc.files import in_thread

PIECE_BYTES = 2**18  # what arrived in part is sent again: on a slow link, little


async def send_chunk(
    channel: grpc.aio.Channel, node: str, file: Path, entry: ChunkEntry, start: int, progress: Progress | None
) -> None:
    """Sends a chunk's file from byte `start` on to a node that was offered it. progress: called with bytes.

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
                if progress:
                    progress(f"weights to {node}", piece.offset + len(piece.data), entry.size_bytes)
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
    while data := await in_thread(source.read, PIECE_BYTES):
        yield node_pb2.WeightsPiece(offset=start, data=data)
        start += len(data)
