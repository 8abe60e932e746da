"""The path under which a proxy shows the server."""

from __future__ import annotations

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

WITH_LINKS = ("/docs", "/openapi.json")
"""What names other paths of the server."""


class RootPath:
    """ASGI middleware that takes the root path off a request's path, whether the proxy has done so or not.

    Everything behind it, and what reads the scope later, meets the routes' own paths. The root path itself leads to
    the page, which names its files as seen from there.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == self._root_path:
            await RedirectResponse(f"{self._root_path}/")(scope, receive, send)
            return
        if scope["type"] == "http":
            if scope["path"].startswith(f"{self._root_path}/"):
                scope["path"] = scope["path"].removeprefix(self._root_path)
            if scope["path"] in WITH_LINKS:  # mounted files would not be found with it
                scope["root_path"] = self._root_path
        await self._app(scope, receive, send)
