"""A running request over HTTP: whole or as server-sent events, and cancelled as soon as its client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from mdi.engine import Completion, Piece, Stream
from mdi.errors import InputError, MDIError
from mdi.gateway.guard import error_body, status_of

DONE = "data: [DONE]\n\n"


async def whole(request: Request, stream: Stream) -> Completion:
    """Waits for a request's end; cancels it when the client goes away first."""
    watch = asyncio.create_task(_cancel_when_gone(request, stream))
    try:
        return await stream.acompletion()
    finally:
        stream.cancel()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def events(
    request: Request, stream: Stream, render: Callable[[AsyncIterator[Piece]], AsyncIterator[dict[str, Any]]]
) -> Response:
    """A stream as server-sent events. `render` turns pieces into the JSON of the events.

    The first piece is awaited before anything is sent, so that an error found until then has its own status.
    """
    try:
        first = await anext(stream, None)
    except BaseException:
        stream.cancel()
        raise

    async def pieces() -> AsyncIterator[Piece]:
        if first is not None:
            yield first
            async for piece in stream:
                yield piece

    async def body() -> AsyncIterator[str]:
        try:
            async for event in render(pieces()):
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            yield DONE
        except MDIError as error:
            field = error.field if isinstance(error, InputError) else None
            yield f"data: {json.dumps(error_body(request.url.path, status_of(error), str(error), field))}\n\n"
        finally:
            stream.cancel()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _cancel_when_gone(request: Request, stream: Stream) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stream.cancel()
