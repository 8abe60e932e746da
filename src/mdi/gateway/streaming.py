"""A running request over HTTP: whole or as server-sent events, and cancelled as soon as its client is gone.

Knows what the gateway needs of an engine, and nothing of what any route's answer looks like.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mdi.core.errors import MDIError
from mdi.core.messages import Chat
from mdi.core.outputs import collect
from mdi.core.sampling import SamplingParams
from mdi.engine import Completion, NodeStatus, Piece, RecoveryStatus, Usage
from mdi.gateway.guard import answer_to

T = TypeVar("T")
DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second: no proxy may hold events back


class Running(Protocol):
    """A request that runs: `mdi.engine.Stream`, or several of them as one."""

    @property
    def usage(self) -> Usage: ...
    def __aiter__(self) -> AsyncIterator[Piece]: ...
    def cancel(self) -> None: ...


class TextEngine(Protocol):
    """What the gateway needs of an engine: `mdi.Engine`, or a double."""

    @property
    def model_name(self) -> str: ...
    @property
    def error(self) -> MDIError | None: ...
    @property
    def recovery(self) -> RecoveryStatus: ...
    def nodes(self) -> list[NodeStatus]: ...
    def ready(self, timeout_s: float) -> bool: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def submit(
        self,
        prompt: str | Chat,
        params: SamplingParams | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Running: ...


async def whole(request: Request, running: Running, timeout_s: float | None) -> Completion:
    """Waits for a request's end.

    Raises ClientDisconnect when the client goes away first, TimeoutError past the limit; both cancel the request.
    """
    try:
        pieces = await _while_connected(request, _all(_timed(running, timeout_s)))
        return collect(pieces, running.usage)
    finally:
        running.cancel()


async def events(
    request: Request,
    running: Running,
    timeout_s: float | None,
    render: Callable[[AsyncIterator[Piece]], AsyncIterator[dict[str, Any]]],
) -> Response:
    """A running request as server-sent events. `render` turns pieces into the JSON of the events.

    The first piece is awaited before anything is sent, so that an error found until then has its own status.
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

    async def body() -> AsyncIterator[str]:
        try:
            async for event in render(pieces()):
                yield _event(event)
            yield DONE
        except Exception as error:
            yield _event(answer_to(error, request.url.path).body)

    return _Events(running, body())


class _Events(StreamingResponse):
    """Cancels its request however it ends; a generator's own `finally` does not run if its client left before it."""

    media_type = "text/event-stream"

    def __init__(self, running: Running, body: AsyncIterator[str]) -> None:
        super().__init__(body, headers=HEADERS)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _timed(running: Running, timeout_s: float | None) -> AsyncIterator[Piece]:
    """The pieces, until the time for all of them is up: then TimeoutError."""
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
    """The work's result; cancels it and raises ClientDisconnect when the client goes away first."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
