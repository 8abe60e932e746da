"""A node's life in one event loop: waiting, receiving, loading, loaded, failed, leaving. No network, real chunks."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from mdi.checkpoint.cache import Cache
from mdi.checkpoint.manifest import Manifest
from mdi.core.errors import CheckpointError, LinkError
from mdi.node.lifecycle import Lifecycle
from mdi.node.settings import NodeSettings
from mdi.rpc import node_pb2

State = node_pb2.NodeStatus
Life = Callable[[Lifecycle], Coroutine[Any, Any, None]]
PIECE_BYTES = 100_000


class Calls:
    """What a lifecycle reported to its owner."""

    def __init__(self) -> None:
        self.dropped = self.failed = self.released = 0
        self.progress: list[str] = []


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def live(calls: Calls, tmp_path: Path) -> Callable[..., None]:
    """Runs a life: a coroutine that is given the lifecycle of a node with these settings."""

    async def run(life: Life, settings: NodeSettings) -> None:
        async def drop() -> None:
            calls.dropped += 1

        lifecycle = Lifecycle(settings, drop)
        lifecycle.start(lambda: setattr(calls, "failed", calls.failed + 1))
        await life(lifecycle)
        await lifecycle.stop()

    def start(life: Life, name: str = "finisher", chunk: Path | None = None, **changes: Any) -> None:
        cache = Cache(tmp_path / "cache", 10**9)
        settings = {"cache": cache, "progress": lambda what, *_: calls.progress.append(what), **changes}
        asyncio.run(run(life, NodeSettings(name, chunk, listen="", **settings)))

    return start


async def until(lifecycle: Lifecycle, state: State.State) -> State:
    for _ in range(600):
        if (status := lifecycle.status()).state == state:
            return status
        await asyncio.sleep(0.05)
    raise AssertionError(f"never {State.State.Name(state)}, but {lifecycle.status()}")


async def pieces(data: bytes, start: int = 0) -> AsyncIterator[node_pb2.WeightsPiece]:
    for offset in range(start, len(data), PIECE_BYTES):
        yield node_pb2.WeightsPiece(offset=offset, data=data[offset : offset + PIECE_BYTES])


async def reply_at_rest(lifecycle: Lifecycle, manifest: Manifest, role: str) -> node_pb2.OfferReply:
    """The answer to an offer, once the node is not loading or checking any more."""
    while True:
        reply = await lifecycle.offer(manifest, role)
        if reply.ready or reply.wanted or reply.damaged:
            return reply
        await asyncio.sleep(0.05)


def test_a_node_loads_its_own_chunk(live: Callable[..., None], chunks: list[Path], manifest: Manifest) -> None:
    async def life(lifecycle: Lifecycle) -> None:
        assert lifecycle.status().state == State.LOADING
        status = await until(lifecycle, State.LOADED)
        assert (status.role, status.first_layer, status.last_layer) == ("finisher", 4, 6)
        assert (status.dtype, status.device) == ("float32", "cpu")
        assert status.done_bytes == status.total_bytes > 0
        assert lifecycle.holding(manifest.digest) is lifecycle.loaded
        with pytest.raises(LinkError, match="does not have these weights"):
            lifecycle.holding("another")

    live(life, chunk=chunks[2], role="finisher")


def test_a_node_without_a_chunk_receives_it_and_has_it_the_next_time(
    live: Callable[..., None], calls: Calls, chunks: list[Path], manifest: Manifest
) -> None:
    data = chunks[2].read_bytes()

    async def first_life(lifecycle: Lifecycle) -> None:
        assert lifecycle.status().state == State.WAITING
        assert await lifecycle.offer(manifest, "finisher") == node_pb2.OfferReply(wanted=True)
        await lifecycle.receive(pieces(data))
        assert (await reply_at_rest(lifecycle, manifest, "finisher")).ready
        assert (await until(lifecycle, State.LOADED)).manifest_digest == manifest.digest

    async def next_life(lifecycle: Lifecycle) -> None:
        assert await lifecycle.offer(manifest, "finisher") == node_pb2.OfferReply()
        assert (await reply_at_rest(lifecycle, manifest, "finisher")).ready

    live(first_life)
    assert set(calls.progress) == {"receiving weights", "loading"}
    calls.progress.clear()
    live(next_life)
    assert set(calls.progress) == {"loading"}
    assert calls.dropped == 2


def test_a_transfer_that_stopped_goes_on_where_it_was(
    live: Callable[..., None], chunks: list[Path], manifest: Manifest
) -> None:
    data = chunks[2].read_bytes()

    async def life(lifecycle: Lifecycle) -> None:
        await lifecycle.offer(manifest, "finisher")
        await lifecycle.receive(pieces(data[: 2 * PIECE_BYTES]))
        reply = await lifecycle.offer(manifest, "finisher")
        assert (reply.wanted, reply.have_bytes) == (True, 2 * PIECE_BYTES)
        await lifecycle.receive(pieces(data, start=2 * PIECE_BYTES))
        assert (await reply_at_rest(lifecycle, manifest, "finisher")).ready

    live(life)


def test_a_node_is_receiving_until_another_offer_ends_the_transfer(
    live: Callable[..., None], chunks: list[Path], manifest: Manifest
) -> None:
    async def endless() -> AsyncIterator[node_pb2.WeightsPiece]:
        yield node_pb2.WeightsPiece(offset=0, data=b"1234")
        await asyncio.sleep(1000)

    async def life(lifecycle: Lifecycle) -> None:
        await lifecycle.offer(manifest, "finisher")
        receiving = asyncio.create_task(lifecycle.receive(endless()))
        while lifecycle.status().done_bytes < 4:
            await asyncio.sleep(0.01)
        assert lifecycle.status().state == State.RECEIVING
        with pytest.raises(CheckpointError, match="no weights are expected"):
            await lifecycle.receive(endless())
        assert (await lifecycle.offer(manifest, "finisher")).have_bytes == 4
        await asyncio.wait_for(receiving, 5)
        assert lifecycle.status().state == State.WAITING

    live(life)


def test_a_chunk_that_was_sent_damaged_is_reported_once_and_then_wanted_again(
    live: Callable[..., None], chunks: list[Path], manifest: Manifest
) -> None:
    data = chunks[2].read_bytes()

    async def life(lifecycle: Lifecycle) -> None:
        await lifecycle.offer(manifest, "finisher")
        await lifecycle.receive(pieces(data[:-1] + bytes([data[-1] ^ 1])))
        reply = await reply_at_rest(lifecycle, manifest, "finisher")
        assert reply.damaged
        assert "finisher" in reply.error
        assert await lifecycle.offer(manifest, "finisher") == node_pb2.OfferReply(wanted=True)
        assert lifecycle.status().state == State.WAITING

    live(life)


def test_a_chunk_that_is_damaged_in_the_cache_is_wanted_again(
    live: Callable[..., None], calls: Calls, chunks: list[Path], manifest: Manifest, tmp_path: Path
) -> None:
    data = chunks[2].read_bytes()
    kept = tmp_path / "cache" / manifest.digest / chunks[2].name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    async def life(lifecycle: Lifecycle) -> None:
        assert await lifecycle.offer(manifest, "finisher") == node_pb2.OfferReply()
        assert await reply_at_rest(lifecycle, manifest, "finisher") == node_pb2.OfferReply(wanted=True)

    live(life)
    assert calls.failed == 0


def test_a_node_whose_own_chunk_is_damaged_has_failed_and_says_why(
    live: Callable[..., None], calls: Calls, chunks: list[Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(chunks[0].parent, tmp_path / "damaged")
    (folder / chunks[2].name).write_bytes(b"nothing")

    async def life(lifecycle: Lifecycle) -> None:
        status = await until(lifecycle, State.FAILED)
        assert "mdi prepare" in status.error

    live(life, chunk=folder / chunks[2].name)
    assert calls.failed == 1


def test_a_node_takes_any_role_unless_it_was_started_for_one(live: Callable[..., None], manifest: Manifest) -> None:
    async def of_a_finisher(lifecycle: Lifecycle) -> None:
        with pytest.raises(CheckpointError, match="is finisher, and cannot be secondary0"):
            await lifecycle.offer(manifest, "secondary0")

    async def of_another(lifecycle: Lifecycle) -> None:
        assert lifecycle.status().role == ""
        with pytest.raises(CheckpointError, match="cannot be captain"):
            await lifecycle.offer(manifest, "captain")
        for role in ("secondary0", "finisher"):
            assert (await lifecycle.offer(manifest, role)).wanted
            status = lifecycle.status()
            assert (status.role, status.node) == (role, "secondary3")

    live(of_a_finisher, role="finisher")
    live(of_another, name="secondary3")


def test_a_node_with_its_own_chunk_and_one_of_another_dtype_take_no_offer(
    live: Callable[..., None], manifest: Manifest
) -> None:
    async def life(lifecycle: Lifecycle) -> None:
        with pytest.raises(CheckpointError, match=r"start it with --nodes-config|mdi prepare --dtype bfloat16"):
            await lifecycle.offer(manifest, "finisher")

    live(life, cache=None)
    live(life, dtype="bfloat16")


def test_a_node_leaves_when_a_starter_polls_it_and_ends_when_it_is_released(
    live: Callable[..., None], calls: Calls
) -> None:
    def released() -> None:
        calls.released += 1

    async def life(lifecycle: Lifecycle) -> None:
        lifecycle.release()
        assert not lifecycle.leave(released)  # there is no starter
        assert not lifecycle.status().leaving
        assert lifecycle.leave(released)
        assert lifecycle.status().leaving
        assert not lifecycle.leave(released)  # the second signal ends it at once
        lifecycle.release()
        await asyncio.sleep(0.01)

    live(life)
    assert calls.released == 1
