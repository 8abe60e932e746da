"""The check of the API key."""

from __future__ import annotations

import secrets

from starlette.types import ASGIApp, Receive, Scope, Send

from mdi.gateway.errors import ErrorAnswer

OPEN_PATHS = ("/health", "/health/ready", "/ping")
UNAUTHORIZED = "this server needs its API key: send Authorization: Bearer KEY"


class ApiKey:
    """ASGI middleware that refuses requests without the key, except health checks."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        answer = ErrorAnswer(401, UNAUTHORIZED, code="invalid_api_key")
        await answer.response(scope["path"], {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return secrets.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"
