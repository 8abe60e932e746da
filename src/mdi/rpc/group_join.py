"""How the ranks of a group are connected: every pair once, and each side checks who the other is.

The rank with the lower index connects to the other, so the first one, the starter, never listens. Both sides then send
a hello. Whoever does not belong here is refused and logged, and keeps nobody waiting. Direct links, see
`rpc/direct_link.py`, begin with the same hellos.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import ssl
import struct
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TypeVar

from mdi.core.cores import usable_cores
from mdi.core.errors import LinkError
from mdi.rpc.sockets import client_context, peer_names, server_context
from mdi.rpc.tls import Identity

log = logging.getLogger(__name__)
T = TypeVar("T")

MAGIC = b"mdi "
HELLO = struct.Struct("<8sQHH64s16s128s")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
BACKLOG = 16
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
Steps = Generator[tuple[socket.socket, int], None, T]
"""Yields the socket and the event that it waits for."""


@dataclass(frozen=True)
class Member:
    """A node of a group: its id, and where its `LinkListener` is. The first member has none."""

    id: str
    address: str = ""
    port: int = 0


class Purpose(Enum):
    """What a connection is for, as its first bytes say. RANK: a group. BATCHES, RESULTS: see `rpc.direct_link`."""

    RANK = b"mdi rank"
    BATCHES = b"mdi hops"
    RESULTS = b"mdi ends"


@dataclass(frozen=True)
class Hello:
    """The first message of both sides. machine: one for each machine. cores: those that the node may use, as bits."""

    epoch: int
    index: int
    n_ranks: int
    node: str
    machine: bytes
    cores: int
    purpose: Purpose = Purpose.RANK

    @classmethod
    def own(cls, epoch: int, index: int, n_ranks: int, node: str, purpose: Purpose = Purpose.RANK) -> Hello:
        return cls(epoch, index, n_ranks, node, _machine(), _own_cores(), purpose)

    def encode(self) -> bytes:
        cores = self.cores.to_bytes(128, "little")
        place = self.epoch, self.index, self.n_ranks
        return HELLO.pack(self.purpose.value, *place, self.node.encode(), self.machine, cores)

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """Raises LinkError for anything else."""
        magic, epoch, index, n_ranks, node, machine, cores = HELLO.unpack(data)
        if magic not in [purpose.value for purpose in Purpose]:
            raise LinkError("it is no node of a cluster")
        name = node.rstrip(b"\0").decode(errors="replace")
        return cls(epoch, index, n_ranks, name, machine, int.from_bytes(cores, "little"), Purpose(magic))

    def check(self, other: Hello, connection: socket.socket, index: int, node: str) -> None:
        """Raises LinkError unless the other side is that rank and node, by its certificate, too, in this epoch."""
        _check_name(connection, node)
        if other.purpose is not self.purpose:
            raise LinkError(f"it comes for {other.purpose.name.lower()}, not for {self.purpose.name.lower()}")
        if other.epoch != self.epoch:
            raise LinkError(f"it is in epoch {other.epoch}, not in {self.epoch}")
        found, expected = (other.index, other.n_ranks, other.node), (index, self.n_ranks, node)
        if found != expected:
            raise LinkError("it is rank {} of {}, node {}, not rank {} of {}, node {}".format(*found, *expected))


class LinkListener:
    """A port for nodes that connect to this one beside gRPC. identity: None where links are not encrypted.

    Raises LinkError when none can be bound.
    """

    def __init__(self, identity: Identity | None, host: str, port: int = 0) -> None:
        """host: the address to bind; empty for all. port: is taken if it is free, else any; 0 is any."""
        self.closed = False
        self._context = server_context(identity) if identity else None
        host = host.strip("[]")
        try:
            self._socket = _bound(host, port)
        except OSError as error:
            raise LinkError(f"no port can be opened on {host!r} for links ({error.strerror or error})") from None
        self._socket.setblocking(False)
        self.port = int(self._socket.getsockname()[1])

    def __enter__(self) -> LinkListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> tuple[socket.socket, str]:
        """A connection, before its handshake, and where it is from. Raises OSError when there is none."""
        connection, place = self._socket.accept()
        return _prepared(connection, self._context, server_side=True), f"{place[0]}:{place[1]}"

    def close(self) -> None:
        """Ends a `join` that accepts, too. Safe to call twice."""
        self.closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    bind = partial(socket.create_server, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    if port:
        try:
            return bind((host, port))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            log.warning("port %d cannot be opened for links (%s): the system chooses another", port, reason)
    return bind((host, 0))


@dataclass(frozen=True)
class Joined:
    """The connections of a rank, by index, in order. has_core: whether it can spin without taking another's core."""

    connections: dict[int, socket.socket]
    has_core: bool


@dataclass(eq=False)
class Greeting:
    """A connection that is not checked yet. asked: this side connects; False for one that came."""

    steps: Steps[None]
    where: str
    asked: bool = False


class Greetings:
    """Handshakes side by side, in one thread. Whoever came and does not belong here is refused and logged.

    welcome: checks a connection that came, and keeps it.
    """

    def __init__(self, listener: LinkListener | None, welcome: Callable[[socket.socket], Steps[None]]) -> None:
        self._listener = listener
        self._welcome = welcome
        self._selector = selectors.PollSelector()  # epoll forgets a listener that another thread closes
        self._greetings = set[Greeting]()
        if listener:
            self._selector.register(listener, READ)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Goes on with those that can; False when there was none until the timeout.

        Raises LinkError when the listener was closed, and what the steps raise for a connection that was asked for.
        """
        events = self._selector.select(timeout_s)
        for key, _ in events:
            if key.data is None:
                self._accept()
            else:
                self._selector.unregister(key.fileobj)
                self.go_on(key.data)
        return bool(events)

    def go_on(self, greeting: Greeting) -> None:
        """As far as it goes now."""
        self._greetings.add(greeting)
        try:
            self._selector.register(*next(greeting.steps), greeting)
            return
        except StopIteration:
            pass
        except (OSError, LinkError) as error:
            if greeting.asked:
                raise
            log.warning("refused a connection from %s: %s", greeting.where, reason_of(error))
        self._greetings.discard(greeting)

    def end(self) -> None:
        """Closes what is not checked yet, and the listener."""
        for greeting in self._greetings:
            greeting.steps.close()
        self._selector.close()
        if self._listener:
            self._listener.close()

    def _accept(self) -> None:
        assert self._listener
        try:
            connection, where = self._listener.accept()
        except OSError as error:
            if self._listener.closed:
                raise LinkError("the listener was closed") from None
            log.warning("a connection was lost before it was checked (%s)", error)
            return
        self.go_on(Greeting(self._welcome(connection), where))


def join(
    index: int,
    members: Sequence[Member],
    listener: LinkListener | None,
    identity: Identity | None,
    epoch: int,
    timeout_s: float,
) -> Joined:
    """See `GroupLink.join`."""
    ids = [member.id for member in members]
    if len({*ids}) < len(ids):
        raise LinkError(f"the nodes of a group need certificates of their own, and these are {', '.join(ids)}")
    joining = Joining(index, members, listener, identity, epoch)
    try:
        joining.run(time.monotonic() + timeout_s)
    except BaseException:
        for connection, _ in joining.joined.values():
            connection.close()
        raise
    finally:
        joining.end()
    ordered = sorted(joining.joined.items())
    has_core = _has_core(joining.own, [hello for _, (_, hello) in ordered])
    return Joined({index: connection for index, (connection, _) in ordered}, has_core)


class Joining:
    """One `join`: greetings side by side, in one thread. joined: the ranks that are there."""

    def __init__(
        self,
        index: int,
        members: Sequence[Member],
        listener: LinkListener | None,
        identity: Identity | None,
        epoch: int,
    ) -> None:
        self.own = Hello.own(epoch, index, len(members), members[index].id)
        self.joined: dict[int, tuple[socket.socket, Hello]] = {}
        self._members = members
        self._port = listener.port if listener else 0
        self._context = client_context(identity) if identity else None
        self._greetings = Greetings(listener, self._welcome)

    def run(self, deadline_s: float) -> None:
        """Until all are joined. Raises LinkError."""
        for index in range(self.own.index + 1, len(self._members)):
            self._greetings.go_on(Greeting(self._connect(index), place_of(self._members[index]), asked=True))
        while missing := [index for index in range(len(self._members)) if not self._is_here(index)]:
            if not self._greetings.wait(max(0.0, deadline_s - time.monotonic())) and time.monotonic() >= deadline_s:
                raise self._timeout(missing[0])

    def end(self) -> None:
        """Closes what is open besides the joined connections."""
        self._greetings.end()

    def _is_here(self, index: int) -> bool:
        return index == self.own.index or index in self.joined

    def _timeout(self, index: int) -> LinkError:
        member = self._members[index]
        if index < self.own.index:
            reason = f"did not connect to {self.own.node}: can its machine open port {self._port} here?"
        else:
            reason = f"does not answer at {place_of(member)}: is that port open in its firewall?"
        return LinkError(f"node {member.id} {reason}", member.id)

    def _connect(self, index: int) -> Steps[None]:
        """To a rank after this one, which answers when it has checked this one. Raises LinkError, naming its node."""
        member = self._members[index]
        try:
            self.joined[index] = yield from introduced(member, self._context, self.own, index)
        except (OSError, LinkError) as error:
            raise LinkError(f"node {member.id} at {place_of(member)}: {reason_of(error)}", member.id) from None

    def _welcome(self, connection: socket.socket) -> Steps[None]:
        """A rank before this one."""
        try:
            hello = yield from hello_from(connection)
            if not hello.index < self.own.index:
                raise LinkError(f"rank {hello.index} does not connect to rank {self.own.index}")
            self.own.check(hello, connection, hello.index, self._members[hello.index].id)
            if hello.index in self.joined:
                raise LinkError(f"rank {hello.index}, node {hello.node}, is here already")
            connection.send(self.own.encode())
        except BaseException:
            connection.close()
            raise
        self.joined[hello.index] = connection, hello


def introduced(
    member: Member, context: ssl.SSLContext | None, own: Hello, index: int
) -> Steps[tuple[socket.socket, Hello]]:
    """A connection to a member's listener, once each side has checked the other. Raises OSError or LinkError."""
    plain = yield from _connected(member.address, member.port)
    connection = _prepared(plain, context, server_side=False)
    try:
        yield from _handshake(connection)
        _check_name(connection, member.id)
        connection.send(own.encode())
        hello = yield from hello_from(connection)
        own.check(hello, connection, index, member.id)
    except BaseException:
        connection.close()
        raise
    return connection, hello


def hello_from(connection: socket.socket) -> Steps[Hello]:
    """The first message of the other side, after the handshake. Raises OSError or LinkError."""
    yield from _handshake(connection)
    data = b""
    while len(data) < HELLO.size:
        more = yield from _when_ready(connection, partial(connection.recv, HELLO.size - len(data)))
        if not more:
            raise LinkError("it ended the connection: its log has the reason")
        data += more
        if not data.startswith(MAGIC[: len(data)]):
            break
    return Hello.decode(data.ljust(HELLO.size, b"\0"))


def reason_of(error: Exception) -> str:
    """Why a connection was not made."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"no encrypted connection with a certificate of this cluster ({error.reason or error})"
    return str(getattr(error, "strerror", None) or error)


def place_of(member: Member) -> str:
    return f"{member.address}:{member.port}"


def _check_name(connection: socket.socket, expected: str) -> None:
    """By the certificate, where there are any."""
    if isinstance(connection, ssl.SSLSocket):
        names = peer_names(connection)
        if names != [expected]:
            raise LinkError(f"it has the certificate of {' and '.join(names) or 'no node'}, not of {expected}")


def _connected(host: str, port: int) -> Steps[socket.socket]:
    """The first of a host's addresses that answers. Raises OSError."""
    failure = OSError("it has no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setblocking(False)
            with suppress(BlockingIOError):
                connection.connect(place)
            yield connection, WRITE
            if code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
            return connection
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
    raise failure


def _prepared(connection: socket.socket, context: ssl.SSLContext | None, *, server_side: bool) -> socket.socket:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if context is None:
        return connection
    return context.wrap_socket(connection, server_side=server_side, do_handshake_on_connect=False)


def _handshake(connection: socket.socket) -> Steps[None]:
    if isinstance(connection, ssl.SSLSocket):
        yield from _when_ready(connection, connection.do_handshake)


def _when_ready(connection: socket.socket, operation: Callable[[], T]) -> Steps[T]:
    while True:
        try:
            return operation()
        except (BlockingIOError, ssl.SSLWantReadError):
            yield connection, READ
        except ssl.SSLWantWriteError:
            yield connection, WRITE


def _machine() -> bytes:
    """16 bytes that all processes of this machine have, those in containers, too."""
    try:
        return uuid.UUID(BOOT_ID.read_text().strip()).bytes
    except (OSError, ValueError):  # no Linux
        return uuid.getnode().to_bytes(16, "little")


def _own_cores() -> int:
    """Those that this process may use, as bits; 1,024 at most. All where that is not known."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return sum(1 << core for core in cores if core < 1024)


def _has_core(own: Hello, others: Sequence[Hello]) -> bool:
    """Whether this rank has a core beside those that the others on its machine need."""
    sharing = sum(other.machine == own.machine and bool(other.cores & own.cores) for other in others)
    return sharing < usable_cores()
