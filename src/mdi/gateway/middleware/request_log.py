"""The id of every request, and its line in the log."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mdi.gateway.errors import CLIENT_GONE
from mdi.gateway.middleware.api_keys import OPEN_PATHS
from mdi.gateway.page import is_page
from mdi.gateway.request_record import PLACE, REQUEST_ID, RequestRecord

USABLE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # of ids that clients give: nothing that a log could misread
SHOWN = 200  # characters of a path
QUIET_PATHS = (*OPEN_PATHS, "/v1/nodes", "/metrics")  # what is asked again and again

LINE = '%(client)s "%(method)s %(path)s" %(status)d'
FIGURES = " %(seconds).3fs key=%(key)s tokens=%(prompt_tokens)d+%(completion_tokens)d id=%(id)s"

log = logging.getLogger("mdi.access")


class RequestLog:
    """ASGI middleware that gives each request its id, taken from its header where usable, and logs its end.

    A line has the client's address, the request, its status, seconds, the name of its key, tokens of prompt and
    answers, and its id. What is asked again and again, as health checks, has none when it succeeds. 499: the client
    left before the end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        record = RequestRecord(given if USABLE.fullmatch(given) else secrets.token_hex(16))
        scope[PLACE] = record
        began, status, complete = time.monotonic(), 500, False

        async def sent(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = record.id
            elif not message.get("more_body"):
                complete = True
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception:
            complete = True
            raise
        finally:
            if log.isEnabledFor(logging.INFO):
                _log(scope, record, status if complete else CLIENT_GONE, time.monotonic() - began)


def _log(scope: Scope, record: RequestRecord, status: int, seconds: float) -> None:
    if (scope["path"] in QUIET_PATHS or is_page(scope["path"])) and status < 400:
        return
    client, usage = scope.get("client"), record.usage
    fields = {
        "client": client[0] if client else "-",
        "method": scope["method"],
        "path": scope["raw_path"].decode("ascii", "backslashreplace")[:SHOWN],  # as it was sent: without line ends
        "status": status,
        "seconds": round(seconds, 6),
        "key": record.key,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "id": record.id,
        "error": record.late_error,
    }
    log.info(LINE + (" error=%(error)s" if record.late_error else "") + FIGURES, fields)
