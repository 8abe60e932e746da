"""What stands before and behind every route: key, body size, and the one table from errors to HTTP answers."""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mdi.errors import (
    ClosedError,
    InputError,
    LinkError,
    MDIError,
    ModelNotFoundError,
    OverloadedError,
)

log = logging.getLogger(__name__)

STATUSES: tuple[tuple[type[MDIError], int], ...] = (  # the first that fits
    (ModelNotFoundError, 404),
    (InputError, 400),
    (OverloadedError, 429),
    (LinkError, 503),
    (ClosedError, 503),
    (MDIError, 500),
)
OPEN_PATHS = ("/health",)
RETRY_AFTER_S = 1
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


def status_of(error: MDIError) -> int:
    """The HTTP status that an error of ours answers with."""
    return next(status for kind, status in STATUSES if isinstance(error, kind))


def error_body(path: str, status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """An error as the route's clients expect it: OpenAI's shape under /v1, `detail` and `field` elsewhere."""
    if path.startswith("/v1"):
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": field, "code": None}}
    return {"detail": message, "field": field}


def install(app: FastAPI, api_key: str | None, max_body_bytes: int) -> None:
    """Adds the handlers and limits to an app."""
    app.add_exception_handler(MDIError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MDIError)
    status = status_of(error)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else None
    field = error.field if isinstance(error, InputError) else None
    return JSONResponse(error_body(request.url.path, status, str(error), field), status, headers)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """pydantic's findings: the first one, as a sentence that names the field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(error_body(request.url.path, 400, "the body is not valid JSON"), 400)
    field = ".".join(str(part) for part in first["loc"] if part != "body") or None
    message = f"{field or 'the body'}: {first['msg'].removeprefix('Value error, ')}"
    return JSONResponse(error_body(request.url.path, 400, message, field), 400)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(request.url.path, error.status_code, error.detail), error.status_code, error.headers)


async def _answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    number = secrets.token_hex(4)
    log.error("request %s to %s failed", number, request.url.path, exc_info=error)
    message = f"internal error {number}; the server's log has the details"
    return JSONResponse(error_body(request.url.path, 500, message), 500)


class Gate:
    """ASGI middleware: refuses requests without the key, and bodies over the limit while they arrive.

    Pure ASGI, because streaming and disconnects must pass through untouched.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._api_key = api_key
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif not self._allowed(scope):
            message = "this server wants its API key: send Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            await JSONResponse(error_body(scope["path"], 401, message), 401, headers)(scope, receive, send)
        else:
            await self._limited(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if self._api_key is None or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, b"Bearer " + self._api_key.encode())

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self._max_body_bytes
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        message = f"the request's body is larger than {self._max_body_bytes} bytes"
        too_large = JSONResponse(error_body(scope["path"], 413, message), 413)
        if announced.isdigit() and int(announced) > left:
            await too_large(scope, receive, send)
            return
        exceeded = started = False

        async def counted() -> Message:
            nonlocal left, exceeded
            arrived = await receive()
            left -= len(arrived.get("body", b""))
            if left < 0:
                exceeded = True
                raise _BodyTooLargeError
            return arrived

        async def unless_exceeded(sent: Message) -> None:
            nonlocal started
            if started or not exceeded:  # else it is the app's own words for the error above
                started = True
                await send(sent)

        with suppress(_BodyTooLargeError):
            await self._app(scope, counted, unless_exceeded)
        if exceeded and not started:
            await too_large(scope, receive, send)


class _BodyTooLargeError(Exception):
    """Leaves the app from inside `receive`."""
