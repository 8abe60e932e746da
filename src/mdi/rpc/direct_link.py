"""Direct links: batches to the next stage and results to the starter, over sockets beside gRPC.

A link carries messages one way. The thread that made a message writes it, and a thread of the other side reads it: no
event loop is on the way. Messages are those of the gRPC streams, each behind its size. The streams stay open: they show
that a node is there, and carry everything where no direct link can be made.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BufferedReader
from typing import Generic, Protocol, TypeVar, cast

from google.protobuf.message import DecodeError, Message

from mdi.core.errors import LinkError
from mdi.rpc import codec
from mdi.rpc.channel import MAX_MESSAGE_BYTES
from mdi.rpc.group_join import (
    WRITE,
    Greetings,
    Hello,
    LinkListener,
    Member,
    Purpose,
    Steps,
    hello_from,
    introduced,
    place_of,
    reason_of,
)
from mdi.rpc.peer import WOULD_BLOCK
from mdi.rpc.sockets import client_context
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

SIZE = struct.Struct("<I")
BUFFER_BYTES = 2**16
CONNECT_S = 1.0  # the kernel answers; so a port that a firewall closes costs no more
GREET_S = 5.0  # the process answers, which may be busy
KEEPALIVE_S = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}  # ends a connection that leads nowhere


class Take(Protocol):
    """Owns a connection from then on. answer: what it writes first, by which the caller knows that it is welcome."""

    def __call__(self, connection: socket.socket, answer: bytes) -> None: ...


class DirectSender:
    """The sending side of a link: `send` in one thread, `close` in any.

    `send` writes what the connection takes at once. A thread writes what is left, and notices that the connection
    broke. lost: called with the reason when it did; not after `close`. traffic: counts what is sent.
    """

    def __init__(self, connection: socket.socket, traffic: Traffic, lost: Callable[[str], None]) -> None:
        self._connection = connection
        self._traffic = traffic
        self._lost = lost
        self._over = False
        self._unsent = deque[memoryview]()
        self._writing = threading.Lock()
        self._wakes, self._wake = socket.socketpair()
        _keep_alive(connection)
        connection.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="mdi-send", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Sends a message, in order, without waiting for the network. Does nothing once the connection broke."""
        data = message.SerializeToString()
        self._traffic.count_sent(len(data))
        self.write(SIZE.pack(len(data)) + data)

    def write(self, data: bytes) -> None:
        """The same for bytes as they are: an answer that comes before all messages."""
        with self._writing:
            if self._over:
                return
            self._unsent.append(memoryview(data))
            reason = self._write() if len(self._unsent) == 1 else ""
            if self._unsent:
                self._wake.send(b"\0")
        self._break(reason)

    def close(self) -> None:
        """Ends the connection, and the thread. Safe to call twice."""
        self._over = True
        with suppress(OSError):  # the thread has ended
            self._wake.send(b"\0")
        self._thread.join()

    def _write(self) -> str:
        """Writes what the connection takes; why it broke, if it did."""
        unsent = self._unsent
        try:
            while unsent:
                n_bytes = self._connection.send(unsent[0])
                if n_bytes < len(unsent[0]):
                    unsent[0] = unsent[0][n_bytes:]
                else:
                    unsent.popleft()
        except WOULD_BLOCK:
            return ""
        except OSError as error:
            return reason_of(error)
        return ""

    def _break(self, reason: str) -> None:
        if reason and not self._over:
            self._over = True
            self._lost(reason)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wakes, select.POLLIN)
        while not self._over:
            poll.register(self._connection, select.POLLIN | select.POLLOUT * bool(self._unsent))
            for number, event in poll.poll():
                if number == self._wakes.fileno():
                    self._wakes.recv(BUFFER_BYTES)
                elif event != select.POLLOUT:  # nothing comes this way but the end
                    self._break("the connection ended")
                else:
                    with self._writing:
                        reason = self._write()
                    self._break(reason)
        with self._writing:
            for one in (self._connection, self._wakes, self._wake):
                one.close()


class DirectReceiver(Generic[M]):
    """The receiving side of a link: a thread that gives each message to `take`.

    kind: of the messages. ended: called when the connection has ended, not after `close`; with the error of a message
    that could not be read or taken. traffic: counts what arrives. first: what is written before anything is read.
    """

    def __init__(
        self,
        connection: socket.socket,
        kind: type[M],
        take: Callable[[M], None],
        ended: Callable[[LinkError | None], None],
        traffic: Traffic,
        first: bytes = b"",
    ) -> None:
        self._connection = connection
        self._kind, self._take, self._ended = kind, take, ended
        self._traffic = traffic
        self._first = first
        self._over = False
        _keep_alive(connection)
        connection.setblocking(True)
        self._thread = threading.Thread(target=self._run, name="mdi-receive", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the connection, and the thread. Safe to call twice."""
        self._over = True
        with suppress(OSError):  # not `SSLSocket.shutdown`, which goes on without encryption
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        failure: LinkError | None = None
        try:
            if self._first:
                self._connection.sendall(self._first)
            with cast(BufferedReader, self._connection.makefile("rb", BUFFER_BYTES)) as stream:
                while (message := self._next(stream)) is not None:
                    self._take(message)
        except OSError:  # it broke, or was closed
            pass
        except LinkError as error:
            failure = error
        finally:
            self._connection.close()
        if not self._over:
            self._ended(failure)

    def _next(self, stream: BufferedReader) -> M | None:
        """None at the end of the connection. Raises LinkError for what is no message."""
        head = stream.read(SIZE.size)
        if len(head) < SIZE.size:
            return None
        [size_bytes] = SIZE.unpack(head)
        if size_bytes > MAX_MESSAGE_BYTES:
            raise LinkError(f"a message of {size_bytes} bytes was announced; the most are {MAX_MESSAGE_BYTES}")
        data = stream.read(size_bytes)
        if len(data) < size_bytes:
            return None
        self._traffic.count_received(size_bytes)
        try:
            return self._kind.FromString(data)
        except DecodeError:
            raise LinkError(codec.OTHER_VERSION) from None


class DirectListener:
    """Where a node waits for those who send to it, or are sent to, until all are there or it is closed.

    callers: for each purpose, the id of the node that comes, once, and what takes its connection. Raises LinkError when
    no port can be opened.
    """

    def __init__(
        self,
        own: str,
        place: tuple[str, int],
        identity: Identity | None,
        epoch: int,
        callers: Mapping[Purpose, tuple[str, Take]],
    ) -> None:
        """own: this node's id. place: host and port, as a `LinkListener` takes them."""
        self._own, self._epoch = own, epoch
        self._callers = dict(callers)
        self._listener = LinkListener(identity, *place)
        threading.Thread(target=self._run, name="mdi-listen", daemon=True).start()

    @property
    def port(self) -> int:
        return self._listener.port

    def close(self) -> None:
        """Ends no connection that was taken. Safe to call twice."""
        self._listener.close()

    def _run(self) -> None:
        greetings = Greetings(self._listener, self._welcome)
        with suppress(LinkError):  # the listener was closed
            while self._callers:
                greetings.wait()
        greetings.end()

    def _welcome(self, connection: socket.socket) -> Steps[None]:
        try:
            hello = yield from hello_from(connection)
            own = Hello.own(self._epoch, 1, 2, self._own, hello.purpose)
            if hello.purpose not in self._callers:
                raise LinkError(f"nobody is awaited here for {hello.purpose.name.lower()}")
            node, take = self._callers[hello.purpose]
            own.check(hello, connection, 0, node)
            del self._callers[hello.purpose]
            take(connection, own.encode())
        except BaseException:
            connection.close()
            raise


def connect(
    purpose: Purpose, own: str, listening: Member, identity: Identity | None, epoch: int
) -> socket.socket | None:
    """A connection to a node's `DirectListener`, once each side has checked the other.

    own: this node's id. None where there is none to be had, which is logged: gRPC carries the messages then.
    """
    if not listening.port:  # a node of an older version
        return None
    try:
        return _connect(purpose, own, listening, identity, epoch)
    except (OSError, LinkError) as error:
        where = f"{place_of(listening)} ({reason_of(error)})"
        log.warning(
            "%s go over gRPC, which is slower: node %s cannot be reached at %s",
            purpose.name.lower(),
            listening.id,
            where,
        )
        return None


def _connect(purpose: Purpose, own: str, listening: Member, identity: Identity | None, epoch: int) -> socket.socket:
    """Raises OSError or LinkError."""
    context = client_context(identity) if identity else None
    steps = introduced(listening, context, Hello.own(epoch, 0, 2, own, purpose), 1)
    try:
        while True:
            waiting, event = next(steps)
            if not _ready(waiting, event, CONNECT_S if event == WRITE else GREET_S):
                raise LinkError("it does not answer")
    except StopIteration as done:
        connection: socket.socket = done.value[0]
        return connection
    finally:
        steps.close()


def _ready(connection: socket.socket, event: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLOUT if event == WRITE else select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE_S.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
