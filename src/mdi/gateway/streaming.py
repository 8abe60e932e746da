"""A running request over HTTP: its completion, or server-sent events. It is cancelled when its client disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mdi.core.outputs import Completion, Piece, collect
from mdi.gateway.engine import Running
from mdi.gateway.errors import answer_to

T = TypeVar("T")
Render = Callable[[AsyncIterator[Piece]], AsyncIterator[dict[str, Any]]]
"""Makes the JSON of a stream's events from its pieces."""

DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second: proxies must not hold events back


async def completion(request: Request, running: Running, timeout_s: float | None) -> Completion:
    """Waits for the end of a request.

    Raises ClientDisconnect when the client disconnects first, TimeoutError past the limit; both cancel the request.
    """
    try:
        pieces = await _while_connected(request, _all(_timed(running, timeout_s)))
        return collect(pieces, running.usage)
    finally:
        running.cancel()


async def events(request: Request, running: Running, timeout_s: float | None, render: Render) -> Response:
    """A running request as server-sent events.

    The response begins with the first piece, so that an error before it has its own status.
    """
    timed = _timed(running, timeout_s)
    try:
        first = await _while_connected(request, _first(timed))
    except BaseException:
        running.cancel()
        raise

    async def pieces() -> AsyncIterator[Piece]:
        if first is not None:
            yield first
        async for piece in timed:
            yield piece

    return _Events(running, _body(render(pieces()), request.url.path))


class _Events(StreamingResponse):
    """Cancels its request however it ends: a generator's `finally` does not run if the client left before its start."""

    media_type = "text/event-stream"

    def __init__(self, running: Running, body: AsyncIterator[str]) -> None:
        super().__init__(body, headers=HEADERS)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


async def _body(contents: AsyncIterator[dict[str, Any]], path: str) -> AsyncIterator[str]:
    """The text of the events. An error in the middle is the last one."""
    try:
        async for content in contents:
            yield _event(content)
        yield DONE
    except Exception as error:
        yield _event(answer_to(error, path).body(path))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _timed(running: Running, timeout_s: float | None) -> AsyncIterator[Piece]:
    """The pieces, until the time for all of them is over: then TimeoutError."""
    deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
    pieces = aiter(running)
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise TimeoutError(f"the answer took longer than {timeout_s:g} s: ask for fewer tokens") from None
        yield piece


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _first(pieces: AsyncIterator[Piece]) -> Piece | None:
    async for piece in pieces:
        return piece
    return None


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work; cancels it and raises ClientDisconnect when the client disconnects first."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
