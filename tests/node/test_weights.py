"""The receiving of a chunk: every piece in its place, and what is there when a transfer ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mdi.checkpoint.cache import Cache
from mdi.checkpoint.manifest import Manifest
from mdi.core.errors import CheckpointError
from mdi.node.store import ChunkStore, StoredChunk
from mdi.node.weights import Intake
from mdi.rpc import node_pb2

Piece = tuple[int, bytes]


@pytest.fixture
def chunk(manifest: Manifest, tmp_path: Path) -> StoredChunk:
    """A finisher's chunk of which nothing is there."""
    return ChunkStore(Cache(tmp_path / "cache", 10**9)).chunk(manifest, "finisher")


@pytest.fixture
def data(chunks: list[Path]) -> bytes:
    return chunks[2].read_bytes()


async def stream(*pieces: Piece) -> AsyncIterator[node_pb2.WeightsPiece]:
    for offset, data in pieces:
        yield node_pb2.WeightsPiece(offset=offset, data=data)


async def transfer(intake: Intake, chunk: StoredChunk, *pieces: Piece) -> tuple[int, StoredChunk | None]:
    """How many bytes were there before, and what came of a transfer."""
    return await intake.expect(chunk), await intake.receive(stream(*pieces), lambda *_: None)


def test_a_chunk_that_arrives_in_one_transfer_is_whole(chunk: StoredChunk, data: bytes) -> None:
    async def run() -> None:
        intake = Intake()
        assert await transfer(intake, chunk, (0, data[:1000]), (1000, data[1000:])) == (0, chunk)
        assert intake.came_whole
        assert not intake.receiving

    asyncio.run(run())
    assert chunk.path.read_bytes() == data


def test_a_chunk_in_two_transfers_is_complete_and_not_known_to_be_whole(chunk: StoredChunk, data: bytes) -> None:
    async def run() -> None:
        intake = Intake()
        assert await transfer(intake, chunk, (0, data[:1000])) == (0, None)
        assert await transfer(intake, chunk, (1000, data[1000:])) == (1000, chunk)
        assert not intake.came_whole

    asyncio.run(run())
    assert chunk.path.read_bytes() == data


@pytest.mark.parametrize("pieces", [[(1, b"x")], [(0, b"xy"), (1, b"y")], [(0, b"xy"), (3, b"z")]])
def test_pieces_that_do_not_follow_each_other_are_refused(chunk: StoredChunk, pieces: list[Piece]) -> None:
    with pytest.raises(CheckpointError, match="do not follow each other"):
        asyncio.run(transfer(Intake(), chunk, *pieces))


def test_more_bytes_than_the_chunk_has_are_refused(chunk: StoredChunk, data: bytes) -> None:
    with pytest.raises(CheckpointError, match="do not follow each other"):
        asyncio.run(transfer(Intake(), chunk, (0, data), (len(data), b"x")))


def test_weights_that_were_not_offered_are_refused() -> None:
    with pytest.raises(CheckpointError, match="offer them first"):
        asyncio.run(Intake().receive(stream((0, b"x")), lambda *_: None))


def test_a_transfer_that_is_stopped_keeps_what_arrived(chunk: StoredChunk, data: bytes) -> None:
    async def run() -> None:
        intake, arrived = Intake(), asyncio.Event()

        async def endless() -> AsyncIterator[node_pb2.WeightsPiece]:
            yield node_pb2.WeightsPiece(offset=0, data=data[:5000])
            arrived.set()
            await asyncio.sleep(1000)

        await intake.expect(chunk)
        receiving = asyncio.create_task(intake.receive(endless(), lambda *_: None))
        await asyncio.wait_for(arrived.wait(), 10)
        before = intake.receiving
        await intake.stop()
        assert await receiving is None
        assert (before, intake.receiving) == (True, False)
        assert await intake.expect(chunk) == 5000

    asyncio.run(run())
