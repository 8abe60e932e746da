"""The connection to another rank of a group: frames out, frames in, never blocking. Belongs to one thread.

A frame is a header of 24 bytes and its content. It may go as one write with what follows it, and arrive in any pieces.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar, cast

from mdi.core.errors import LinkError
from mdi.core.group import Rank
from mdi.rpc.traffic import Traffic

T = TypeVar("T")
HEADER = struct.Struct("<IIQQ")
JOINED_BYTES = 16_000  # with its header in one TLS record, and one write
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Reading = Generator[None, None, T]
"""Reads as far as it can each time it is resumed; returns what was read."""


class Kind(IntEnum):
    """BATCH: from `lead`. PARTIALS: from `exchange`. COLUMNS: from `gather`."""

    BATCH = 1
    PARTIALS = 2
    COLUMNS = 3


class Frame(NamedTuple):
    """What a frame's header says.

    sequence: counts the calls of all ranks. size_bytes: of the content. start: the first row of partial sums; the size
    of the message that begins a batch; 0 for columns.
    """

    kind: int
    start: int
    sequence: int
    size_bytes: int

    def message(self, *parts: memoryview) -> list[memoryview]:
        """Header and content, as they are written."""
        header = HEADER.pack(*self)
        if self.size_bytes <= JOINED_BYTES:
            return [memoryview(b"".join((header, *parts)))]
        return [memoryview(header), *parts]


class Peer:
    """Another rank, and the connection to it. Methods raise LinkError, naming its node, when the connection breaks."""

    def __init__(self, node: str, rank: Rank, connection: socket.socket, traffic: Traffic) -> None:
        self.node = node
        self.rank = rank
        self._connection = connection
        self._traffic = traffic
        self._outgoing = deque[memoryview]()
        self._header = memoryview(bytearray(HEADER.size))
        self._early = memoryview(b"")
        readable = select.poll()
        readable.register(connection, select.POLLIN)
        self._readable = readable.poll
        self._send: Callable[[memoryview], int] = connection.send
        self._receive: Callable[[int, memoryview], int] = lambda size, target: connection.recv_into(target, size)
        if isinstance(connection, ssl.SSLSocket):  # what `send` and `recv_into` call; these never go on in plain text
            self._send, self._receive = connection.write, cast("Any", connection.read)

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def writes(self) -> bool:
        """Whether something is left to be written."""
        return bool(self._outgoing)

    def put(self, message: Sequence[memoryview]) -> None:
        """Adds what is written next. It must stay as it is until `writes` is false."""
        self._outgoing += message

    def write(self) -> None:
        """Writes as much as the connection takes."""
        outgoing = self._outgoing
        while outgoing and self.send(outgoing.popleft()):
            pass

    def send(self, data: memoryview) -> bool:
        """Writes one piece, before all that was put. Returns False, and puts the rest, if that is not taken at once."""
        try:
            n_bytes = self._send(data)
        except WOULD_BLOCK:
            n_bytes = 0
        except OSError as error:
            raise self._broken(error) from None
        self._traffic.sent_bytes += n_bytes
        if n_bytes == len(data):
            return True
        self._outgoing.appendleft(data[n_bytes:])
        return False

    def spin(self, spin_s: float) -> bool:
        """Waits without sleep until there is something to read. Returns False if nothing comes in that time."""
        if self._readable(0):
            return True
        until_s = time.perf_counter() + spin_s
        while time.perf_counter() < until_s:
            if self._readable(0):
                return True
        return False

    def receive(self, target: memoryview) -> int | None:
        """Reads the next bytes that are there, into the front of `target`. Returns how many, or None."""
        if self._early:
            n_bytes = min(len(target), len(self._early))
            target[:n_bytes] = self._early[:n_bytes]
            self._early = self._early[n_bytes:]
            return n_bytes
        try:
            n_bytes = self._receive(len(target), target)
        except WOULD_BLOCK:
            return None
        except OSError as error:
            raise self._broken(error) from None
        if not n_bytes:
            raise LinkError(f"node {self.node} ended its connection to the group", self.node)
        self._traffic.received_bytes += n_bytes
        return n_bytes

    def unread(self, data: memoryview) -> None:
        """Gives back what `receive` has just read: it is read again. It must stay as it is until then."""
        self._early = data

    def read(self, target: memoryview) -> Reading[None]:
        """Fills `target` with the next bytes."""
        while target:
            n_bytes = self.receive(target)
            if n_bytes is None:
                yield
            else:
                target = target[n_bytes:]

    def read_frame(self, kind: Kind, sequence: int) -> Reading[Frame]:
        """The next header. Raises LinkError for one that is not of this call."""
        yield from self.read(self._header)
        frame = Frame(*HEADER.unpack(self._header))
        if (frame.kind, frame.sequence) != (kind, sequence):
            name = Kind(frame.kind).name.lower() if frame.kind in list(Kind) else f"kind {frame.kind}"
            raise self.out_of_step(f"{name} {frame.sequence}, not {kind.name.lower()} {sequence}")
        return frame

    def out_of_step(self, what: str) -> LinkError:
        """The error for a frame that does not fit. what: what was sent."""
        return LinkError(f"node {self.node} is out of step with its group: it sent {what}", self.node)

    def shut(self) -> None:
        """Ends the connection under a thread that waits for it. For any thread."""
        with suppress(OSError):  # not `SSLSocket.shutdown`, which goes on without encryption
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()

    def _broken(self, error: OSError) -> LinkError:
        return LinkError(f"the connection to node {self.node} broke ({error})", self.node)
