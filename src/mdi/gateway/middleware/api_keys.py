"""The check of API keys and of their limits."""

from __future__ import annotations

from datetime import datetime
from secrets import compare_digest

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mdi.gateway.errors import ErrorAnswer
from mdi.gateway.keys import Key, Keys, has_expired
from mdi.gateway.middleware.host_names import is_loopback, name_of
from mdi.gateway.page import is_page
from mdi.gateway.request_record import record_of

OPEN_PATHS = ("/health", "/health/ready", "/ping")
METRICS = "/metrics"  # open where the server binds loopback, to who names it so
UNAUTHORIZED = "this server needs an API key: send Authorization: Bearer KEY, or x-api-key: KEY"


class ApiKeys:
    """ASGI middleware that refuses requests without a key, except for health and the page, and those beyond its limits.

    host: the address or name that the server binds. metrics_key: opens GET /metrics and nothing else.

    The limits are for requests that ask for an answer (POST).
    """

    def __init__(self, app: ASGIApp, keys: Keys, host: str, metrics_key: str | None = None) -> None:
        self._app = app
        self._keys = keys
        self._local = is_loopback(host)
        self._metrics_key = metrics_key.encode() if metrics_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        key = await self._keys.find(_secret(dict(scope["headers"])))
        if key is None or has_expired(key, self._keys.clock()):
            message = UNAUTHORIZED if key is None else f"the key {key.name} expired at {_shown(key.expires)}"
            answer = ErrorAnswer(401, message, code="invalid_api_key")
            await answer.response(scope["path"], {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        record_of(scope).key = key.name
        if scope["method"] == "POST":
            await self._within_limits(key, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if scope["path"] == METRICS:
            local = self._local and is_loopback(name_of(Headers(scope=scope).get("host", "")))
            return local or self._is_metrics_key(_secret(dict(scope["headers"])))
        return scope["path"] in OPEN_PATHS or is_page(scope["path"])

    def _is_metrics_key(self, secret: bytes) -> bool:
        return self._metrics_key is not None and compare_digest(secret, self._metrics_key)

    async def _within_limits(self, key: Key, scope: Scope, receive: Receive, send: Send) -> None:
        account = self._keys.account(key)
        if refusal := account.begin(key, self._keys.clock()):
            answer = ErrorAnswer(429, refusal.message, code="rate_limit_exceeded", retry_after_s=refusal.retry_after_s)
            await answer.response(scope["path"])(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            usage = record_of(scope).usage
            account.end(usage.prompt_tokens + usage.completion_tokens, self._keys.clock())


def _secret(headers: dict[bytes, bytes]) -> bytes:
    """The key as OpenAI's clients send it, or Anthropic's."""
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    return given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()


def _shown(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M %Z}"
