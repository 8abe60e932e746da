"""The page at /: chat in the browser, and the machines, live. Its files are in assets/page; it uses the API alone."""

from __future__ import annotations

import base64
import hashlib
import mimetypes
import re
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

FOLDER = Path(__file__).parents[1] / "assets" / "page"
FILES_PATH = "/page"
HTML = (FOLDER / "index.html").read_text()
IMPORT_MAP = re.compile(r'<script type="importmap">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class File:
    """One of the page's files, kept in memory: a page asks for twenty at once, and all are a third of a megabyte."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> File:
        content = path.read_bytes()
        kind = mimetypes.guess_type(path.name)[0] or "text/plain"
        return cls(content, kind, f'"{hashlib.sha256(content).hexdigest()[:16]}"')

    def answer(self, known: str | None) -> Response:
        """known: the etag of what the browser has."""
        headers = {"ETag": self.etag}
        if known == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def router() -> APIRouter:
    routes = APIRouter()
    files = {str(path.relative_to(FOLDER)): File.read(path) for path in FOLDER.rglob("*") if path.is_file()}

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(HTML)

    @routes.get(FILES_PATH + "/{name:path}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404)
        return files[name].answer(request.headers.get("if-none-match"))

    return routes


def is_page(path: str) -> bool:
    """Whether the path is the page or one of its files: they hold no secrets, and need no key."""
    return path == "/" or path.startswith(f"{FILES_PATH}/")


def script_hash() -> str:
    """Of the one script that stands in the page itself, as a Content-Security-Policy names it."""
    found = IMPORT_MAP.search(HTML)
    assert found
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
