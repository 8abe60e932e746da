"""The limits on the size of requests' bodies."""

from __future__ import annotations

from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mdi.core.config import MEBIBYTE
from mdi.gateway.errors import ErrorAnswer

MAX_HELD_BYTES = 1024 * MEBIBYTE
HELD = ErrorAnswer(429, "the requests that are being answered are as large as they may be together: try again later")


class BodyLimit:
    """ASGI middleware that refuses bodies above the limit of their kind, announced or not, while they arrive.

    It also limits the bodies of all running requests together. It is plain ASGI, because streams and disconnects must
    pass through unchanged.

    max_bytes: of JSON. max_upload_bytes: of a form with files.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes
        self.free = max(MAX_HELD_BYTES, max_bytes, max_upload_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        most = self._max_upload_bytes if form else self._max_bytes
        body = _LimitedBody(receive, send, most, _too_large(most, form), self)
        announced = headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > most:
            body.refusal = body.too_large
        else:
            try:
                with suppress(_RefusedError):
                    await self._app(scope, body.receive, body.send)
            finally:
                self.free += body.arrived
        if body.refusal and not body.answered:
            await body.refusal.response(scope["path"])(scope, receive, send)


def _too_large(most: int, form: bool) -> ErrorAnswer:
    remedy = "--max-upload-mb" if form else "--max-body-mb, or send files as a form to /generate/multimodal"
    text = f"the request's body is larger than {most / MEBIBYTE:g} MiB: start the server with a higher {remedy}"
    return ErrorAnswer(413, text)


class _LimitedBody:
    """One request's body: counts what arrives, and drops the app's own answer to a body that was refused."""

    def __init__(self, receive: Receive, send: Send, most: int, too_large: ErrorAnswer, shared: BodyLimit) -> None:
        self.too_large = too_large
        self.refusal: ErrorAnswer | None = None
        self.answered = False
        self.arrived = 0
        self._receive = receive
        self._send = send
        self._most = most
        self._shared = shared

    async def receive(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self.arrived += size
        self._shared.free -= size
        if self.arrived > self._most:
            self.refusal = self.too_large
        elif self._shared.free < 0:
            self.refusal = HELD
        if self.refusal:
            raise _RefusedError
        return message

    async def send(self, message: Message) -> None:
        if self.answered or not self.refusal:  # otherwise it is the app's own answer to the error above
            self.answered = True
            await self._send(message)


class _RefusedError(Exception):
    """Leaves the app from inside `receive`."""
