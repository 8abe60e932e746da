"""The limit on the size of a request's body."""

from __future__ import annotations

from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mdi.gateway.errors import ErrorAnswer


class BodyLimit:
    """ASGI middleware that refuses bodies above the limit, announced or not, while they arrive.

    It is plain ASGI, because streams and disconnects must pass through unchanged.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        body = _LimitedBody(receive, send, self._max_bytes)
        if announced.isdigit() and int(announced) > self._max_bytes:
            body.exceeded = True
        else:
            with suppress(_BodyTooLargeError):
                await self._app(scope, body.receive, body.send)
        if body.exceeded and not body.answered:
            answer = ErrorAnswer(413, f"the request's body is larger than {self._max_bytes} bytes")
            await answer.response(scope["path"])(scope, receive, send)


class _LimitedBody:
    """One request's body: counts what arrives, and drops the answer to a body that exceeded the limit."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        self.exceeded = False
        self.answered = False
        self._receive = receive
        self._send = send
        self._left = max_bytes

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.exceeded = True
            raise _BodyTooLargeError
        return message

    async def send(self, message: Message) -> None:
        if self.answered or not self.exceeded:  # otherwise it is the app's own answer to the error above
            self.answered = True
            await self._send(message)


class _BodyTooLargeError(Exception):
    """Leaves the app from inside `receive`."""
