"""A running request over HTTP: its completion, or server-sent events. It is cancelled when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mdi.core.errors import ClosedError
from mdi.core.outputs import Completion, Piece, collect
from mdi.gateway.engine import Running
from mdi.gateway.errors import answer_to
from mdi.gateway.json_text import json_text
from mdi.gateway.request_record import record_of

T = TypeVar("T")
Render = Callable[[AsyncIterator[Piece]], AsyncIterator[dict[str, Any]]]
"""Makes the JSON of a stream's events from its pieces."""

STATUS_S = 0.5  # an error within this time is a stream's status, a later one its last event
COMMENT_S = 2.0  # clients may give up when nothing comes for some seconds
COMMENT = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second: proxies must not hold events back


class Answers:
    """All running answers of a server, so that a shutdown can end them."""

    def __init__(self) -> None:
        self._closed = False
        self._waits = set[asyncio.Timeout]()

    def close(self) -> None:
        """Ends every answer with ClosedError, now and from now on. Call it in the event loop."""
        self._closed = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())

    async def pieces(self, running: Running, timeout_s: float | None) -> AsyncGenerator[Piece, None]:
        """The pieces of a request. Raises TimeoutError when they take too long together, ClosedError at `close`."""
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        pieces = aiter(running)
        while not self._closed:
            try:
                async with asyncio.timeout_at(deadline) as wait:
                    self._waits.add(wait)
                    piece = await anext(pieces)
            except StopAsyncIteration:
                return
            except TimeoutError:
                break
            finally:
                self._waits.discard(wait)
            yield piece
        raise self._cause(timeout_s)

    def _cause(self, timeout_s: float | None) -> Exception:
        if self._closed:
            return ClosedError("the server is shutting down")
        return TimeoutError(f"the answer took longer than {timeout_s:g} s: ask for fewer tokens")


async def completion(request: Request, running: Running, timeout_s: float | None) -> Completion:
    """Waits for the end of a request.

    Raises ClientDisconnect when the client disconnects first, TimeoutError past the limit; both cancel the request.
    """
    answers: Answers = request.app.state.answers
    record_of(request.scope).running = running
    try:
        pieces = await _while_connected(request, _all(answers.pieces(running, timeout_s)))
        return collect(pieces, running.usage)
    finally:
        running.cancel()


async def events(
    request: Request, running: Running, timeout_s: float | None, render: Render, *, named: bool = False
) -> Response:
    """A running request as server-sent events, with comments while nothing comes.

    named: every event is named by its `type`, and none marks the end.
    The response begins with the first event or after STATUS_S. An error before that is raised, for its own status.
    """
    answers: Answers = request.app.state.answers
    record_of(request.scope).running = running
    contents = _Waited(render(answers.pieces(running, timeout_s)))
    try:
        if await _while_connected(request, contents.arrives(STATUS_S)):
            contents.check()
    except BaseException:
        running.cancel()
        await contents.close()
        raise
    return _Events(running, contents, request, named)


class _Events(StreamingResponse):
    """Cancels its request however it ends: a generator's `finally` does not run if the client left before its start."""

    media_type = "text/event-stream"

    def __init__(self, running: Running, contents: _Waited, request: Request, named: bool) -> None:
        super().__init__(_body(contents, request, named), headers=HEADERS)
        self._running = running
        self._contents = contents

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()
            await self._contents.close()


class _Waited:
    """The contents of events. A wait for the next one can be given up, and begun again."""

    def __init__(self, contents: AsyncIterator[dict[str, Any]]) -> None:
        self._contents = contents
        self._next: asyncio.Future[dict[str, Any]] | None = None

    async def arrives(self, within_s: float) -> bool:
        """Whether the next one, the end or an error comes within this time."""
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._contents))
        await asyncio.wait((self._next,), timeout=within_s)
        return self._next.done()

    def check(self) -> None:
        """Raises the error that came in place of the next one, unless it is the end."""
        error = self._next and self._next.exception()
        if error and not isinstance(error, StopAsyncIteration):
            raise error

    def take(self) -> dict[str, Any]:
        """The one that has arrived. Raises StopAsyncIteration at the end, or the error."""
        assert self._next
        arrived, self._next = self._next, None
        return arrived.result()

    async def close(self) -> None:
        """Ends a wait that is not over."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)


async def _body(contents: _Waited, request: Request, named: bool) -> AsyncIterator[str]:
    """The text of the events. An error in the middle is the last one."""
    try:
        while True:
            while not await contents.arrives(COMMENT_S):
                yield COMMENT
            yield _event(contents.take(), named)
    except StopAsyncIteration:
        if not named:
            yield DONE
    except Exception as error:
        answer = answer_to(error, request.url.path)
        record_of(request.scope).late_error = answer.status
        yield _event(answer.body(request.url.path), named)


def _event(content: dict[str, Any], named: bool) -> str:
    name = f"event: {content['type']}\n" if named and "type" in content else ""
    return f"{name}data: {json_text(content)}\n\n"


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


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
