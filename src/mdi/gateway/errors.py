"""Errors as HTTP: the one table from errors to statuses, the bodies of error answers, and the handlers."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

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
from mdi.gateway.request_record import REQUEST_ID, record_of
from mdi.gateway.schemas import NOT_AN_OBJECT

log = logging.getLogger(__name__)

STATUSES: tuple[tuple[type[Exception], int], ...] = (  # the first that fits
    (ModelNotFoundError, 404),
    (InputError, 400),
    (OverloadedError, 429),
    (LinkError, 503),
    (ClosedError, 503),
    (TimeoutError, 504),
    (Exception, 500),
)
CONFIDENTIAL = (ConfigError, CheckpointError)  # their texts are for the operator: they name files
TYPES = {  # OpenAI's names
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
ANTHROPICS_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
METHODS = ("DELETE", "GET", "POST")
RETRY_AFTER_S = 1
MAX_CHARACTERS = 1000  # of a text in an error: it may quote what was sent
CLIENT_GONE = 499  # for logs, as nginx; no client receives it


@dataclass(frozen=True)
class ErrorAnswer:
    """An error as HTTP. field: the request's name of the part that is wrong. code: OpenAI's, where it has one.

    retry_after_s: when a request that is one too many may be sent again.
    """

    status: int
    message: str
    field: str | None = None
    code: str | None = None
    retry_after_s: int = RETRY_AFTER_S

    def body(self, path: str) -> dict[str, Any]:
        """The JSON that the path's clients expect: OpenAI's or Anthropic's, or `detail` and `field`."""
        message, field = _shortened(self.message), _shortened(self.field)
        if is_anthropics(path):
            return self._anthropics(message, field)
        if not is_openais(path):
            return {"detail": message, "field": field}
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": field, "code": self.code}}

    def _anthropics(self, message: str, field: str | None) -> dict[str, Any]:
        """Anthropic's error, which has no place for the field but the message."""
        kind = ANTHROPICS_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        text = f"{field}: {message}" if field and field not in message else message
        return {"type": "error", "error": {"type": kind, "message": text}}

    def response(self, path: str, headers: Mapping[str, str] | None = None) -> Response:
        if self.status == 429:
            headers = {**(headers or {}), "Retry-After": str(self.retry_after_s)}
        content = json.dumps(self.body(path))  # as ASCII: a field's name may hold half of a surrogate pair
        return Response(content, self.status, headers, "application/json")


def is_anthropics(path: str) -> bool:
    """Whether a path is one of Anthropic's."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def is_openais(path: str) -> bool:
    """Whether a path is one of OpenAI's, or of those that vLLM adds in its form."""
    return (path.startswith("/v1/") and not is_anthropics(path)) or path in ("/tokenize", "/detokenize")


@overload
def _shortened(text: str) -> str: ...
@overload
def _shortened(text: None) -> None: ...
def _shortened(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


def answer_to(error: Exception, path: str) -> ErrorAnswer:
    """The answer to an error. What clients must not read goes to the log, under a number that the answer names."""
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    if isinstance(error, CONFIDENTIAL) or not isinstance(error, (MDIError, TimeoutError)):
        number = secrets.token_hex(4)
        log.error("request %s to %s failed", number, path, exc_info=error)
        return ErrorAnswer(status, f"internal error {number}; the server's log has the details")
    field = error.field if isinstance(error, InputError) else None
    code = "model_not_found" if isinstance(error, ModelNotFoundError) else None
    return ErrorAnswer(status, str(error) or "the answer took too long", field, code)


def install(app: FastAPI) -> None:
    """Adds the handlers of all errors to an app."""
    for kind in (MDIError, TimeoutError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_unreadable)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)


async def _answer_error(request: Request, error: Exception) -> Response:
    """The request's id goes with it, because the answer to an unforeseen error passes no middleware."""
    headers = {REQUEST_ID: record_of(request.scope).id}
    return answer_to(error, request.url.path).response(request.url.path, headers)


async def _answer_unreadable(request: Request, error: Exception) -> Response:
    """Answers FastAPI's finding that there is no body, or no JSON in it. The requests' models check all the rest."""
    assert isinstance(error, RequestValidationError)
    not_json = error.errors()[0]["type"] == "json_invalid"
    return await _answer_error(request, InputError("the body is not valid JSON" if not_json else NOT_AN_OBJECT))


async def _answer_http(request: Request, error: Exception) -> Response:
    """Answers starlette's own errors, such as an unknown path."""
    assert isinstance(error, HTTPException)
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
    return ErrorAnswer(error.status_code, error.detail).response(request.url.path, headers)


def _allowed(request: Request) -> str:
    """The methods of a path, which may have several routes."""

    def takes(method: str) -> bool:
        asked = {**request.scope, "method": method}
        return any(route.matches(asked)[0] is Match.FULL for route in request.app.routes)

    return ", ".join(filter(takes, METHODS))


async def _answer_disconnect(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=CLIENT_GONE)
