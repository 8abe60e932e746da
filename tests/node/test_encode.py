"""What a vision node makes of bytes that are no image."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mdi.checkpoint.loader import load_source
from mdi.checkpoint.source import open_source
from mdi.core.errors import LinkError
from mdi.core.tracing import Recorder
from mdi.models.weights import LoadedStage
from mdi.node.encode import Encoder, collect_rows, rows_of
from mdi.rpc import codec, node_pb2


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedStage:
    return load_source(open_source(tiny_checkpoint), dtype="float32")


def collected(*pieces: node_pb2.EncodePiece) -> tuple[str, tuple[int, int, int], bytearray]:
    async def stream() -> AsyncIterator[node_pb2.EncodePiece]:
        for piece in pieces:
            yield piece

    return asyncio.run(collect_rows(stream()))


def test_pieces_are_put_together() -> None:
    first = node_pb2.EncodePiece(manifest_digest="abc", grid=[1, 4, 6], data=b"12")
    assert collected(first, node_pb2.EncodePiece(data=b"34")) == ("abc", (1, 4, 6), bytearray(b"1234"))


@pytest.mark.parametrize("grid", [[1], [1, 2], [1, 2, 3, 4]])
def test_a_grid_has_three_sides(grid: list[int]) -> None:
    with pytest.raises(LinkError, match="three sides"):
        collected(node_pb2.EncodePiece(grid=grid))


def test_no_more_is_taken_than_a_batch_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_BATCH_BYTES", 10)
    with pytest.raises(LinkError, match="larger than 10 bytes"):
        collected(node_pb2.EncodePiece(data=b"123456"), node_pb2.EncodePiece(data=b"789012"))


@given(
    grid=st.tuples(*[st.integers(0, 2**31)] * 3) | st.tuples(*[st.integers(0, 6)] * 3),
    size=st.integers(0, 40).map(lambda count: count * 1176),
)
def test_bytes_that_do_not_fit_their_grid_are_refused(
    loaded: LoadedStage, grid: tuple[int, int, int], size: int
) -> None:
    try:
        rows = rows_of(loaded, grid, bytearray(size))
    except LinkError:
        return
    t, h, w = grid
    assert len(rows) == t * h * w > 0
    assert h % 2 == w % 2 == 0


def test_an_image_that_is_not_wanted_any_more_is_not_encoded_to_its_end(
    loaded: LoadedStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B3: the next one does not wait for it."""
    steps = 0
    begun = threading.Event()

    def endless(rows: Tensor, grid: tuple[int, int, int]) -> Iterator[None]:
        nonlocal steps
        while True:
            steps += 1
            begun.set()
            yield

    monkeypatch.setattr(loaded.vision, "encode_steps", endless)

    async def leave() -> None:
        encoder = Encoder(Recorder())
        running = asyncio.create_task(encoder.encode(loaded, (1, 2, 2), bytearray(4 * 1176 * 4)))
        await asyncio.to_thread(begun.wait)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
        assert not encoder._one_by_one.locked()

    asyncio.run(leave())
    before = steps
    time.sleep(0.05)
    assert steps == before
