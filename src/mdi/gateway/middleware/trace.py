"""The trace of every request that asks for an answer."""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mdi.gateway.engine import TextEngine
from mdi.gateway.request_record import record_of
from mdi.gateway.traces import TracedRequest, Traces

PARENT = ("traceparent", "tracestate")  # W3C's headers


class TraceRequests:
    """ASGI middleware that traces POST requests. model: its name in traces."""

    def __init__(self, app: ASGIApp, traces: Traces, engine: TextEngine, model: str) -> None:
        self._app = app
        self._traces = traces
        self._engine = engine
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        status = 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            self._traces.add(self._ended(scope, status), self._engine.measurements.recoveries)

    def _ended(self, scope: Scope, status: int) -> TracedRequest:
        headers, record = Headers(scope=scope), record_of(scope)
        return TracedRequest(
            record.id,
            scope["path"],
            self._model,
            {name: headers[name] for name in PARENT if name in headers},
            record.began_s,
            time.monotonic(),
            status,
            record.late_error,
            record.running.timing if record.running else None,
            record.usage,
        )
