"""The caller's end of a request: pieces in order, callers that are behind, and waits that end from other threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mdi.core.batch import Token
from mdi.core.errors import LinkError
from mdi.core.outputs import Piece
from mdi.engine.stream import JOINED_CHARACTERS, MANY, Stream


def piece(text: str, index: int = 0, **settings: object) -> Piece:
    return Piece(index, text, (Token(len(text), 0.0),), **settings)  # type: ignore[arg-type]


async def read(stream: Stream) -> list[Piece]:
    return [piece async for piece in stream]


def test_pieces_come_as_they_were_put() -> None:
    stream, pieces = Stream(lambda: None), [piece(str(number), number % 2) for number in range(MANY - 1)]
    for item in (*pieces, None):
        stream.put(item)
    assert asyncio.run(read(stream)) == pieces


def test_a_caller_that_is_behind_gets_one_piece_a_sample() -> None:
    """With all tokens and the end of each; errors come after the pieces before them."""
    stream = Stream(lambda: None)
    for number in range(50):
        for index in (0, 1):
            stream.put(piece(f"{number},", index))
    stream.put(piece("end", 1, finish_reason="stop", stopped_by="!"))
    stream.put(LinkError("lost"))

    found = list[Piece]()

    async def run() -> None:
        async for item in stream:
            found.append(item)  # those before the error

    with pytest.raises(LinkError):
        asyncio.run(run())
    assert [(item.index, item.finish_reason, item.stopped_by) for item in found] == [(0, None, None), (1, "stop", "!")]
    text = "".join(f"{number}," for number in range(50))
    assert [item.text for item in found] == [text, text + "end"]
    assert [len(item.tokens) for item in found] == [50, 51]


def test_a_caller_that_is_far_behind_gets_no_more_at_once_than_it_can_send() -> None:
    stream = Stream(lambda: None)
    for _ in range(40):
        stream.put(piece("x" * JOINED_CHARACTERS))

    async def read_one() -> Piece:
        return await anext(stream)

    first = asyncio.run(read_one())
    assert len(first.text) <= 2 * JOINED_CHARACTERS
    assert stream._items.qsize() >= 38


def test_a_caller_that_is_behind_lets_others_run() -> None:
    stream = Stream(lambda: None)
    for _ in range(10):
        stream.put(piece("x"))
    stream.put(None)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def run() -> None:
        task = asyncio.create_task(other())
        await read(stream)
        task.cancel()

    asyncio.run(run())
    assert turns >= 10


def test_many_waits_end_from_many_threads() -> None:
    """None is missed, whenever it comes."""
    streams = [Stream(lambda: None) for _ in range(50)]

    def feed(mine: list[Stream]) -> None:
        for number in range(40):
            for stream in mine:
                stream.put(piece(f"{number},"))
        for stream in mine:
            stream.put(None)

    async def run() -> list[list[Piece]]:
        threads = [threading.Thread(target=feed, args=(streams[start::5],)) for start in range(5)]
        reading = asyncio.gather(*map(read, streams))
        await asyncio.sleep(0)
        for thread in threads:
            thread.start()
        return await reading

    expected = "".join(f"{number}," for number in range(40))
    assert all("".join(item.text for item in pieces) == expected for pieces in asyncio.run(run()))


def test_a_wait_that_is_given_up_loses_nothing() -> None:
    stream = Stream(lambda: None)

    async def run() -> list[Piece]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        stream.put(piece("x"))
        stream.put(None)
        return await read(stream)

    assert [item.text for item in asyncio.run(run())] == ["x"]
