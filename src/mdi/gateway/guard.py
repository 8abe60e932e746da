"""What stands before and behind every route: key, body size, and the one table from errors to HTTP answers."""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mdi.core.errors import (
    CheckpointError,
    ClosedError,
    ConfigError,
    InputError,
    LinkError,
    MDIError,
    ModelNotFoundError,
    OverloadedError,
)
from mdi.gateway.schemas import NOT_AN_OBJECT

log = logging.getLogger(__name__)

STATUSES: tuple[tuple[type[MDIError], int], ...] = (  # the first that fits
    (ModelNotFoundError, 404),
    (InputError, 400),
    (OverloadedError, 429),
    (LinkError, 503),
    (ClosedError, 503),
    (MDIError, 500),
)
OURS_ALONE = (ConfigError, CheckpointError)  # their texts are for the operator: they name files
OPEN_PATHS = ("/health", "/health/ready")
RETRY_AFTER_S = 1
CLIENT_GONE = 499  # nobody reads it; nginx's number, for logs
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True)
class Answer:
    """An error as HTTP: status and JSON body."""

    status: int
    body: dict[str, Any]

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status == 429 else None
        return JSONResponse(self.body, self.status, headers)


def answer_to(error: Exception, path: str) -> Answer:
    """The one table from errors to answers. What is not the client's to know is logged under a number."""
    if isinstance(error, TimeoutError):
        return Answer(504, error_body(path, 504, str(error) or "the answer took too long"))
    if not isinstance(error, MDIError) or isinstance(error, OURS_ALONE):
        number = secrets.token_hex(4)
        log.error("request %s to %s failed", number, path, exc_info=error)
        return Answer(500, error_body(path, 500, f"internal error {number}; the server's log has the details"))
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    field = error.field if isinstance(error, InputError) else None
    code = "model_not_found" if isinstance(error, ModelNotFoundError) else None
    return Answer(status, error_body(path, status, str(error), field, code))


def error_body(
    path: str, status: int, message: str, field: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as the route's clients expect it: OpenAI's shape under /v1, `detail` and `field` elsewhere."""
    if path.startswith("/v1/"):
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": field, "code": code}}
    return {"detail": message, "field": field}


def install(app: FastAPI, api_key: str | None, max_body_bytes: int) -> None:
    """Adds the handlers and limits to an app."""
    for kind in (MDIError, TimeoutError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes)


async def _answer_error(request: Request, error: Exception) -> Response:
    return answer_to(error, request.url.path).response()


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """FastAPI's findings: a body that is no JSON, or none at all. What is in it, the requests' models check."""
    assert isinstance(error, RequestValidationError)
    invalid = error.errors()[0]["type"] == "json_invalid"
    return await _answer_error(request, InputError("the body is not valid JSON" if invalid else NOT_AN_OBJECT))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(request.url.path, error.status_code, error.detail), error.status_code, error.headers)


async def _answer_nobody(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=CLIENT_GONE)


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
            await JSONResponse(error_body(scope["path"], 401, message, code="invalid_api_key"), 401, headers)(
                scope, receive, send
            )
        else:
            await self._limited(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if self._api_key is None or scope["path"] in OPEN_PATHS:
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return secrets.compare_digest(given.strip(), self._api_key.encode()) and scheme.lower() == b"bearer"

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
