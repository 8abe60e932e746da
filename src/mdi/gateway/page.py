"""The page at /: chat in the browser, and the machines, live. Its files are in assets/page; it uses the API alone."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parents[1] / "assets" / "page"
FILES_PATH = "/page"
HTML = (FOLDER / "index.html").read_text()
IMPORT_MAP = re.compile(r'<script type="importmap">(.*?)</script>', re.DOTALL)


def router() -> APIRouter:
    routes = APIRouter()
    files = StaticFiles(directory=FOLDER)

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(HTML)

    @routes.get(FILES_PATH + "/{name:path}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        return await files.get_response(name, request.scope)

    return routes


def is_page(path: str) -> bool:
    """Whether the path is the page or one of its files: they hold no secrets, and need no key."""
    return path == "/" or path.startswith(f"{FILES_PATH}/")


def script_hash() -> str:
    """Of the one script that stands in the page itself, as a Content-Security-Policy names it."""
    found = IMPORT_MAP.search(HTML)
    assert found
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
