"""The check that no web page of another site uses a server without a key through its reader's browser."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mdi.gateway.errors import ErrorAnswer
from mdi.gateway.middleware.host_names import address_of, is_loopback, name_of

READING = ("GET", "HEAD", "OPTIONS")  # the browser keeps the answers to these from other sites' pages
SHOWN = 100  # characters of a header in an error


class ForeignPages:
    """ASGI middleware that refuses names of the server it does not know, and changes asked for by pages of other sites.

    The first: an attacker's name may be made to lead to this address ("DNS rebinding"), and its pages would then be
    this server's own. A key, which such pages do not have, makes both checks needless.

    host: the address or name that the server binds. hosts: further names of it. origins: sites whose pages may ask;
    "*" is all.
    """

    def __init__(self, app: ASGIApp, host: str, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self._app = app
        self._loopback = is_loopback(host)
        self._names = {"localhost", host.lower(), *(name.lower() for name in hosts)}
        if not self._loopback:
            own = socket.gethostname().lower()
            self._names |= {own, f"{own.partition('.')[0]}.local"}
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await ErrorAnswer(403, refusal).response(scope["path"])(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self._is_own(name_of(host)):  # browsers always send one
            named = name_of(host)[:SHOWN]
            return (
                f"this server does not know the name {named!r}: start it with --allow-host {named}, or with --api-key"
            )
        if method in READING or origin is None or not self._origins.isdisjoint((origin, "*")):
            return None
        if urlsplit(origin).netloc.lower() == (host or "").lower():
            return None
        named = origin[:SHOWN]
        return f"pages of {named!r} may not use this server: start it with --allow-origin {named}, or with --api-key"

    def _is_own(self, name: str) -> bool:
        """Whether a name is this server's. An address is no name that anyone else could have made to lead here."""
        address = address_of(name)
        if address is not None and (address.is_loopback or not self._loopback):
            return True
        return name in self._names
