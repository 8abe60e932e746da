"""The connection to another rank of a group: frames out, frames in, never blocking. Belongs to one thread.

A frame is a header of 24 bytes and its content. It may go as one write with what follows it, and arrive in any pieces.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import NamedTuple, TypeVar

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
        while outgoing:
            n_bytes = self._try(self._connection.send, outgoing[0])
            if n_bytes is None:
                return
            self._traffic.sent_bytes += n_bytes
            if n_bytes < len(outgoing[0]):
                outgoing[0] = outgoing[0][n_bytes:]
            else:
                outgoing.popleft()

    def read(self, target: memoryview) -> Reading[None]:
        """Fills `target` with the next bytes."""
        while target:
            n_bytes = self._try(self._connection.recv_into, target)
            if n_bytes is None:
                yield
                continue
            if not n_bytes:
                raise LinkError(f"node {self.node} ended its connection to the group", self.node)
            self._traffic.received_bytes += n_bytes
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

    def _try(self, operation: Callable[[memoryview], int], data: memoryview) -> int | None:
        """How many bytes were moved; None where it would block."""
        try:
            return operation(data)
        except WOULD_BLOCK:
            return None
        except OSError as error:
            raise LinkError(f"the connection to node {self.node} broke ({error})", self.node) from None
