"""A running request over HTTP: its completion, or server-sent events. It is cancelled when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mdi.core.errors import ClosedError
from mdi.core.outputs import Completion, Piece, collect
from mdi.gateway.engine import Running
from mdi.gateway.errors import answer_to
from mdi.gateway.json_text import json_text
from mdi.gateway.metrics import Metrics
from mdi.gateway.request_record import record_of

T = TypeVar("T")
Content = dict[str, Any]
Render = Callable[[AsyncIterator[Piece]], AsyncIterator[Content]]
"""Makes the JSON of a stream's events from its pieces."""

STATUS_S = 0.5  # an error within this time is a stream's status, a later one its last event
COMMENT_S = 2.0  # clients may give up when nothing comes for some seconds
COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second: proxies must not hold events back


class Answers:
    """All running answers of a server, so that a shutdown can end them."""

    def __init__(self) -> None:
        self._closed = False
        self._limits = set[asyncio.Timeout]()

    def close(self) -> None:
        """Ends every answer with ClosedError, now and from now on. Call it in the event loop."""
        self._closed = True
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def limited(self, timeout_s: float | None, began_s: float) -> AsyncIterator[asyncio.Timeout]:
        """Limits the time of what is inside. Raises TimeoutError when it is over, ClosedError at `close`.

        began_s: by the event loop's clock. What is given ends the inside at once when it is rescheduled to now.
        """
        deadline = None if timeout_s is None else began_s + timeout_s
        try:
            async with asyncio.timeout_at(began_s if self._closed else deadline) as limit:
                self._limits.add(limit)
                yield limit
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._cause(timeout_s) from None
        finally:
            self._limits.discard(limit)

    def _cause(self, timeout_s: float | None) -> Exception:
        if self._closed:
            return ClosedError("the server is shutting down")
        return TimeoutError(f"the answer took longer than {timeout_s or 0:g} s: ask for fewer tokens")


async def completion(request: Request, running: Running, timeout_s: float | None) -> Completion:
    """Waits for the end of a request.

    Raises ClientDisconnect when the client disconnects first, TimeoutError past the limit; both cancel the request.
    """
    answers: Answers = request.app.state.answers
    running = _observed(request, running)

    async def all_pieces() -> list[Piece]:
        async with answers.limited(timeout_s, asyncio.get_running_loop().time()):
            return [piece async for piece in running]

    try:
        return collect(await _while_connected(request, all_pieces()), running.usage)
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
    running = _observed(request, running)
    began_s = asyncio.get_running_loop().time()
    contents = render(aiter(running))
    first = asyncio.ensure_future(anext(contents))
    try:
        async with answers.limited(timeout_s, began_s):
            await _while_connected(request, _done(first, STATUS_S))
        if first.done() and (error := first.exception()) and not isinstance(error, StopAsyncIteration):
            raise error
    except BaseException:
        running.cancel()
        await _ended(first)
        raise
    return _Events(request, running, first, contents, partial(answers.limited, timeout_s, began_s), named)


class _Events(Response):
    """Sends the events of a running request in one task, and cancels the request however it ends.

    first, contents: the first event's content, which may be yet to come, and the further ones. limited: see `Answers`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        running: Running,
        first: asyncio.Future[Content],
        contents: AsyncIterator[Content],
        limited: Callable[[], AbstractAsyncContextManager[asyncio.Timeout]],
        named: bool,
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._request = request
        self._running = running
        self._first = first
        self._contents = contents
        self._limited = limited
        self._named = named
        self._left = False  # the client has
        self._sent_s = asyncio.get_running_loop().time()  # the last event or comment

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        beside = [self._first]
        try:
            await self._send_all(receive, send, beside)
        finally:
            self._running.cancel()
            await _ended(*beside)

    async def _send_all(self, receive: Receive, send: Send, beside: list[asyncio.Future[Any]]) -> None:
        """Sends the events until their end. An error in the middle is the last one. beside: gets tasks to end after."""
        last = b"" if self._named else DONE
        try:
            async with self._limited() as limit:
                beside.append(asyncio.create_task(self._watch(receive, limit)))
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                beside.append(asyncio.create_task(self._comment(send)))
                async for content in _all(self._first, self._contents):
                    await self._send(send, _event(content, self._named))
        except Exception as error:
            if self._left:
                return
            answer = answer_to(error, self._request.url.path)
            record_of(self._request.scope).late_error = answer.status
            last = _event(answer.body(self._request.url.path), self._named)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _watch(self, receive: Receive, limit: asyncio.Timeout) -> None:
        """Ends the sending when the client disconnects."""
        await _disconnect(receive)
        self._left = True
        limit.reschedule(asyncio.get_running_loop().time())

    async def _comment(self, send: Send) -> None:
        """Sends a comment whenever nothing was sent for COMMENT_S."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._sent_s + COMMENT_S - loop.time())
            if loop.time() - self._sent_s >= COMMENT_S:
                await self._send(send, COMMENT)

    async def _send(self, send: Send, event: bytes) -> None:
        self._sent_s = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": event, "more_body": True})


def _observed(request: Request, running: Running) -> Running:
    """The same, whose tokens and times are counted, also in the request's record."""
    record, metrics = record_of(request.scope), request.app.state.metrics
    assert isinstance(metrics, Metrics)
    record.running = observed = metrics.observed(running, record.began_s)
    return observed


def _event(content: Content, named: bool) -> bytes:
    name = f"event: {content['type']}\n" if named and "type" in content else ""
    return f"{name}data: {json_text(content)}\n\n".encode()


async def _all(first: asyncio.Future[Content], others: AsyncIterator[Content]) -> AsyncIterator[Content]:
    try:
        yield await first
    except StopAsyncIteration:
        return
    async for content in others:
        yield content


async def _done(work: asyncio.Future[Any], within_s: float) -> None:
    """Waits for the end of some work, at most for this time."""
    await asyncio.wait((work,), timeout=within_s)


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Ends tasks that are not over."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work; cancels it and raises ClientDisconnect when the client disconnects first."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_disconnect(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _ended(working, watching)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
