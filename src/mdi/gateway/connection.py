"""A client's connection: HTTP/1.1 by uvicorn, how long its client lets the server wait, and how many there may be."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from mdi.gateway.errors import ErrorAnswer

MIN_BYTES_PER_S = 500  # of a body, over all of its time
FREE_LINES = 8_000  # of a body in chunks, two for each chunk: as many as are read in a tenth of a second
MIN_BYTES_PER_LINE = 32  # beyond those
TINY_CHUNKS = ErrorAnswer(400, "the body comes in chunks of a few bytes: send larger ones, or a Content-Length")
REQUEST_TIMEOUT = ErrorAnswer(408, "the request did not arrive in time")
SHUTTING_DOWN = ErrorAnswer(503, "the server is shutting down")
FULL = ErrorAnswer(503, "the server has too many connections: try again later")
LOG_EVERY_S = 60.0

log = logging.getLogger(__name__)


class Connection(H11Protocol):
    """Counts what arrives, so that `overdue` can tell a slow client from one that only holds the connection."""

    def __init__(self, limit: ConnectionLimit, **given: Any) -> None:
        super().__init__(**given)
        self._limit = limit

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.last_arrival = self.loop.time()
        self._begun: float | None = self.last_arrival  # of a head or a body; None between two requests
        self._arrived = 0  # bytes, since then
        self._lines = 0  # since then
        self._blocked = 0.0  # since when the answer is not read, while it is not
        self._limit.admit(self, [each for each in self.connections if isinstance(each, Connection)])

    def data_received(self, data: bytes) -> None:
        self.last_arrival = self.loop.time()
        self._arrived += len(data)
        self._lines += data.count(b"\r\n")
        if self._begun is None:
            self._begun = self.last_arrival
        if self._in_chunks() and self._lines > FREE_LINES and self._arrived < self._lines * MIN_BYTES_PER_LINE:
            self.end(TINY_CHUNKS)  # each chunk costs as much as many bytes
        else:
            super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # a head is complete
            self._begun, self._arrived, self._lines = self.loop.time(), 0, 0

    def on_response_complete(self) -> None:
        self._begun = None
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._blocked = self.loop.time()
        super().pause_writing()

    def _in_chunks(self) -> bool:
        return self.cycle is not None and self.cycle.more_body and (b"transfer-encoding", b"chunked") in self.headers

    @property
    def answering(self) -> bool:
        """Whether a request runs: its head has arrived, and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def receiving(self) -> bool:
        """Whether the client has yet to send a request, or the rest of one."""
        return not self.answering or self.cycle.more_body

    def overdue(self, head_s: float, stall_s: float) -> bool:
        """Whether the client took too long: for a head, for the next part of a body, or to read its answer."""
        now = self.loop.time()
        if self.flow.write_paused:
            return now - self._blocked > stall_s
        if self._begun is None or self.flow.read_paused or not self.receiving:
            return False
        if not self.answering:
            return now - self._begun > head_s
        too_slow = now - self._begun > stall_s + self._arrived / MIN_BYTES_PER_S
        return too_slow or now - self.last_arrival > stall_s

    def end(self, answer: ErrorAnswer | None = None) -> None:
        """Closes the connection at once. answer: what its client is sent, unless another answer has begun."""
        if answer and self._begun is not None and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._send(answer)
            self.transport.close()
        else:
            self.transport.abort()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def shutdown(self) -> None:
        """Ends the connection unless a whole request has arrived on it: uvicorn calls this to begin a shutdown."""
        if self.answering and self.receiving:
            self.end(SHUTTING_DOWN)
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP: uvicorn's own answer raises an error when another answer has begun."""
        self.end(ErrorAnswer(400, msg))

    def _send(self, answer: ErrorAnswer) -> None:
        content = json.dumps(answer.body(self.scope["path"] if self.answering else "")).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
            ("connection", "close"),
        ]
        head = h11.Response(status_code=answer.status, headers=headers, reason=STATUS_PHRASES[answer.status])
        for event in (head, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")


class ConnectionLimit:
    """The most connections at once. Beyond them, the one ends that has waited longest for its client, if any waits."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._warning = Occasionally()

    def admit(self, new: Connection, connections: list[Connection]) -> None:
        """Makes room for a new connection, or ends it."""
        if len(connections) <= self._most:
            return
        open_ones = [each for each in connections if not each.transport.is_closing()]
        if len(open_ones) <= self._most:
            return
        self._warning.log("%d connections are open, the most there may be: idle and slow ones are closed", self._most)
        waiting = [each for each in open_ones if each.receiving and each is not new]
        if waiting:
            min(waiting, key=lambda each: each.last_arrival).end()
        else:
            new.end(FULL)


class Occasionally:
    """A warning that is logged once a minute, however often its cause recurs."""

    def __init__(self) -> None:
        self._next = 0.0

    def log(self, text: str, *arguments: object) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LOG_EVERY_S
            log.warning(text, *arguments)
