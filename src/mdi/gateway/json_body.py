"""JSON from clients: checked before it is parsed, because a small text can make millions of objects."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import HTTPException, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from mdi.core.config import MEBIBYTE
from mdi.core.errors import InputError

UNCHECKED_BYTES = 64 * 1024  # parsed within some milliseconds, whatever is in it
MAX_ESCAPES = 2 * 10**6  # base64 of 64 MiB has a million slashes, which some clients escape
MAX_TEXT_BYTES = 8 * MEBIBYTE  # a prompt of 131,072 tokens has about 1 MiB
MAX_STRUCTURE_BYTES = 2 * MEBIBYTE  # as token ids, it has as much
MAX_STRINGS = 100_000
MAX_COUNTS = {b",": 300_000, b":": 30_000, b"{": 10_000, b"[": 10_000}
"""The most values, keys, objects and lists."""

NOT_PLAIN = b"\\" + bytes(range(32))  # what a JSON string has escaped


class JSONRoute(APIRoute):
    """A route whose requests are read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JSONRequest(request.scope, request.receive))

        return handle_json


class _JSONRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            chunks = [chunk async for chunk in self.stream()]
            self._body = await asyncio.to_thread(b"".join, chunks)  # which lets other threads run meanwhile
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = await read_json(await self.body(), "the body")
            except InputError as error:
                raise HTTPException(400, str(error)) from None  # FastAPI hides other errors
            self._body = b""  # parsed: the bytes are not kept while the request runs
        return self._json


async def read_json(text: bytes, name: str, field: str | None = None) -> Any:
    """The content of a JSON text. Raises InputError, naming it, for any other, and for one with too many parts."""
    if len(text) <= UNCHECKED_BYTES:
        return _parsed(text, name, field)
    return await asyncio.to_thread(_checked, text, name, field)


def _checked(text: bytes, name: str, field: str | None) -> Any:
    rest, files = _take_files(text)
    if excess := _excess(rest):
        raise InputError(f"{name} has more than {excess}", field)
    return _put_back(_parsed(rest, name, field), files)


def _parsed(text: bytes, name: str, field: str | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{name} is not valid JSON", field) from None


def _take_files(text: bytes) -> tuple[bytes, dict[str, str]]:
    """The text with a name in place of each long data: URL, and the URLs by these names.

    Python's parser would keep all other threads from running while it reads them. What has escapes is left to it, and
    what is no value.
    """
    secret, files = secrets.token_hex(16), dict[str, str]()
    kept, start, begin = list[bytes](), 0, -1
    for _ in range(MAX_STRINGS):
        begin = text.find(b'"data:', begin + 1)
        end = text.find(b'"', begin + 1)
        if begin < 0 or end < 0:
            break
        if end - begin > UNCHECKED_BYTES and (file := _plain_value(text, begin, end)):
            name = f"{secret}{len(files)}"
            files[name] = file
            kept += (text[start : begin + 1], name.encode())
            start = end
        begin = end - 1
    return (b"".join((*kept, text[start:])), files) if files else (text, files)


def _plain_value(text: bytes, begin: int, end: int) -> str | None:
    """The string between two quotes, if it is no key and has nothing that a parser replaces or refuses."""
    if text[max(0, begin - 1) : begin] == b"\\" or text[end + 1 : end + 9].lstrip()[:1] == b":":
        return None
    pieces = (text[first : min(first + MEBIBYTE, end)] for first in range(begin, end, MEBIBYTE))
    if any(len(piece.translate(None, NOT_PLAIN)) < len(piece) for piece in pieces):
        return None
    try:
        return str(memoryview(text)[begin + 1 : end], "ascii")  # copied once
    except UnicodeDecodeError:
        return None


def _put_back(value: Any, files: Mapping[str, str]) -> Any:
    """The value with the files in the places of their names; without recursion, which a request could make deep."""
    whole = [value]
    containers: list[Any] = [whole] if files else []
    while containers:
        container = containers.pop()
        for place, item in list(container.items() if isinstance(container, dict) else enumerate(container)):
            if isinstance(item, dict | list):
                containers.append(item)
            elif isinstance(item, str) and item in files:
                container[place] = files[item]
    return whole[0]


def _excess(text: bytes) -> str | None:
    """What a JSON text has too much of, found by a few passes at the speed of memory; None if nothing."""
    if (escapes := text.count(b"\\")) > MAX_ESCAPES:
        return f"{MAX_ESCAPES:,} escaped characters"
    if escapes:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote now begins or ends a string
    if text.count(b'"') > 2 * MAX_STRINGS:
        return f"{MAX_STRINGS:,} strings"
    parts = _without_files(text).split(b'"')
    structure, strings = b"".join(parts[::2]), parts[1::2]
    if len(structure) > MAX_STRUCTURE_BYTES:
        return f"{MAX_STRUCTURE_BYTES // MEBIBYTE} MiB outside of strings"
    if sum(map(len, strings)) > MAX_TEXT_BYTES:
        return f"{MAX_TEXT_BYTES // MEBIBYTE} MiB of text, apart from data: URLs"
    if any(structure.count(sign) > most for sign, most in MAX_COUNTS.items()):
        return f"{MAX_COUNTS[b',']:,} values, {MAX_COUNTS[b':']:,} keys, or {MAX_COUNTS[b'{']:,} objects or lists"
    return None


def _without_files(text: bytes) -> bytes:
    """The text with its data: URLs as empty strings."""
    kept, start = list[bytes](), 0
    while (begin := text.find(b'"data:', start)) >= 0 and (end := text.find(b'"', begin + 1)) >= 0:
        kept.append(text[start : begin + 1])
        start = end
    return b"".join((*kept, text[start:]))
