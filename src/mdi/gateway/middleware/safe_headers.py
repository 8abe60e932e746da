"""The headers that keep browsers from doing more with an answer than showing it."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mdi.gateway.page import is_page, script_hash

SHUT = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE = (
    f"{SHUT}; script-src 'self' {script_hash()}; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; media-src blob:; require-trusted-types-for 'script'; trusted-types dompurify"
)
DOCS = (  # its first script stands in the page
    f"{SHUT}; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:"
)
DOCS_PATHS = ("/docs", "/docs/")


class SafeHeaders:
    """ASGI middleware that adds a Content-Security-Policy to answers: the page's, that of /docs, or nothing at all.

    The page's files are asked for anew each time: after an update, none may be of the version before.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add(MutableHeaders(scope=message), scope["path"])
            await send(message)

        await self._app(scope, receive, sent if scope["type"] == "http" else send)


def _add(headers: MutableHeaders, path: str) -> None:
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers["Content-Security-Policy"] = PAGE if is_page(path) else DOCS if path in DOCS_PATHS else SHUT
    if is_page(path):
        headers["Cache-Control"] = "no-cache"
