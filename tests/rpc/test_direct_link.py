"""Direct links, over real sockets: messages in order, whatever their size, and only from whom they are awaited."""

from __future__ import annotations

import queue
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace

import pytest
from testing.links import RecordingProxy
from testing.waiting import wait_for

from mdi.core.errors import LinkError
from mdi.rpc import direct_link, node_pb2
from mdi.rpc.authority import Authority
from mdi.rpc.channel import MAX_MESSAGE_BYTES
from mdi.rpc.codec import OTHER_VERSION
from mdi.rpc.direct_link import DirectListener, DirectReceiver, DirectSender, connect
from mdi.rpc.group_join import HELLO, Hello, Member, Purpose
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic

EPOCH = 7
Piece = node_pb2.BatchPiece


@dataclass
class Node:
    """The finisher's end: takes batches from secondary0, and gives results to the starter."""

    identity: Identity | None
    host: str = "127.0.0.1"
    arrived: queue.SimpleQueue[node_pb2.BatchPiece] = field(default_factory=queue.SimpleQueue)
    ended: queue.SimpleQueue[LinkError | None] = field(default_factory=queue.SimpleQueue)
    traffic: Traffic = field(default_factory=Traffic)
    receiver: DirectReceiver[node_pb2.BatchPiece] | None = None
    results: DirectSender | None = None
    reading: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.reading.set()
        callers = {Purpose.BATCHES: ("secondary0", self._receive), Purpose.RESULTS: ("starter", self._send)}
        self.listener = DirectListener("finisher", (self.host, 0), self.identity, EPOCH, callers)
        self.member = Member("finisher", self.host, self.listener.port)

    def _receive(self, connection: socket.socket, answer: bytes) -> None:
        self.receiver = DirectReceiver(connection, Piece, self._take, self.ended.put, self.traffic, answer)

    def _take(self, piece: node_pb2.BatchPiece) -> None:
        self.reading.wait(20)
        self.arrived.put(piece)

    def _send(self, connection: socket.socket, answer: bytes) -> None:
        self.results = DirectSender(connection, self.traffic, lambda _: None)
        self.results.write(answer)

    def close(self) -> None:
        self.listener.close()
        for link in (self.receiver, self.results):
            if link:
                link.close()


@contextmanager
def sending(member: Member, identity: Identity | None, lost: queue.SimpleQueue[str]) -> Iterator[DirectSender]:
    connection = connect(Purpose.BATCHES, "secondary0", member, identity, EPOCH)
    assert connection
    with closing(DirectSender(connection, Traffic(), lost.put)) as sender:
        yield sender


@pytest.fixture(params=["encrypted", "plain"])
def security(request: pytest.FixtureRequest, authority: Authority) -> Authority | None:
    return authority if request.param == "encrypted" else None


def identity_of(authority: Authority | None, name: str) -> Identity | None:
    return authority.issue(name) if authority else None


def test_messages_of_any_size_arrive_in_order_and_are_counted(security: Authority | None) -> None:
    sent = [Piece(batch_id=number, data=b"x" * n_bytes) for number, n_bytes in enumerate((0, 3072, 1_000_000, 7) * 9)]
    lost = queue.SimpleQueue[str]()
    with (
        closing(Node(identity_of(security, "finisher"))) as node,
        sending(node.member, identity_of(security, "secondary0"), lost) as sender,
    ):
        for piece in sent:
            sender.send(piece)
        assert [node.arrived.get(timeout=20) for _ in sent] == sent
        assert node.traffic.received_bytes == sum(piece.ByteSize() for piece in sent)
    assert lost.empty()  # whoever closes knows


def test_who_sends_does_not_wait_for_who_reads(security: Authority | None) -> None:
    lost = queue.SimpleQueue[str]()
    with closing(Node(identity_of(security, "finisher"))) as node:
        node.reading.clear()
        with sending(node.member, identity_of(security, "secondary0"), lost) as sender:
            piece = Piece(data=b"x" * 1_000_000)
            for _ in range(40):
                sender.send(piece)
            assert node.traffic.received_bytes < 40 * piece.ByteSize()
            node.reading.set()
            wait_for(lambda: node.traffic.received_bytes == 40 * piece.ByteSize())


def test_results_go_back_over_a_link_of_the_starter(security: Authority | None) -> None:
    results = queue.SimpleQueue[node_pb2.BatchResult]()
    ended = queue.SimpleQueue[LinkError | None]()
    with closing(Node(identity_of(security, "finisher"))) as node:
        connection = connect(Purpose.RESULTS, "starter", node.member, identity_of(security, "starter"), EPOCH)
        assert connection
        with closing(DirectReceiver(connection, node_pb2.BatchResult, results.put, ended.put, Traffic())):
            assert node.results
            node.results.send(node_pb2.BatchResult(batch_id=3, token_ids=[5]))
            assert results.get(timeout=20).token_ids == [5]
            node.results.close()
            assert ended.get(timeout=20) is None


def test_an_idle_sender_notices_that_its_link_ended(security: Authority | None) -> None:
    lost = queue.SimpleQueue[str]()
    with (
        closing(Node(identity_of(security, "finisher"))) as node,
        sending(node.member, identity_of(security, "secondary0"), lost) as sender,
    ):
        wait_for(lambda: node.receiver is not None)
        assert node.receiver
        node.receiver.close()
        assert lost.get(timeout=20)
        sender.send(Piece())  # is of no more use, and no error


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (struct.pack("<I", MAX_MESSAGE_BYTES + 1), f"a message of {MAX_MESSAGE_BYTES + 1} bytes was announced"),
        (struct.pack("<I", 3) + b"\xff\xff\xff", OTHER_VERSION),
        (struct.pack("<I", 3) + b"\xff", None),  # ends in the middle
    ],
)
def test_what_is_no_message_ends_the_link(data: bytes, expected: str | None) -> None:
    with closing(Node(None)) as node:
        connection = connect(Purpose.BATCHES, "secondary0", node.member, None, EPOCH)
        assert connection
        with connection:
            connection.setblocking(True)
            connection.sendall(data)
            if expected:
                assert connection.recv(1) == b""
        error = node.ended.get(timeout=20)
        assert expected in str(error) if expected else error is None


@pytest.mark.parametrize("purpose", [Purpose.BATCHES, Purpose.RESULTS, Purpose.RANK])
@pytest.mark.parametrize("caller", ["starter", "secondary0", "secondary1", "vision", "finisher", "spare0"])
def test_only_who_is_awaited_is_let_in(
    purpose: Purpose, caller: str, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = {Purpose.BATCHES: "secondary0", Purpose.RESULTS: "starter"}
    with closing(Node(authority.issue("finisher"))) as node:
        connection = connect(purpose, caller, node.member, authority.issue(caller), EPOCH)
        assert bool(connection) == (caller == allowed.get(purpose))
        if connection:
            connection.close()
        else:
            assert f"{purpose.name.lower()} go over gRPC, which is slower: node finisher" in caplog.text
            wait_for(lambda: "refused a connection from 127.0.0.1:" in caplog.text)


@pytest.mark.parametrize("case", ["stranger", "borrowed name", "other epoch", "no certificate", "plain text", "silent"])
def test_strangers_are_refused_and_keep_nobody_waiting(
    case: str, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    own = authority.issue("secondary0")
    with ExitStack() as stack:
        node = stack.enter_context(closing(Node(authority.issue("finisher"))))
        place = (node.host, node.member.port)
        if case == "stranger":
            trusting = replace(Authority.create().issue("secondary0"), authority=authority.pem)
            assert not connect(Purpose.BATCHES, "secondary0", node.member, trusting, EPOCH)
        elif case == "borrowed name":
            assert not connect(Purpose.BATCHES, "secondary0", node.member, authority.issue("secondary1"), EPOCH)
        elif case == "other epoch":
            assert not connect(Purpose.BATCHES, "secondary0", node.member, own, EPOCH - 1)
        elif case == "no certificate":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            encrypted = stack.enter_context(context.wrap_socket(stack.enter_context(socket.create_connection(place))))
            with suppress(OSError):
                assert not encrypted.recv(1)
        else:
            connection = stack.enter_context(socket.create_connection(place))
            if case == "plain text":
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with sending(node.member, own, queue.SimpleQueue()) as sender:
            sender.send(Piece(batch_id=5))
            assert node.arrived.get(timeout=20).batch_id == 5
        if case == "silent":
            assert not caplog.text
        else:
            wait_for(lambda: "refused a connection from 127.0.0.1:" in caplog.text)


def test_a_second_connection_for_the_same_is_refused(authority: Authority) -> None:
    own = authority.issue("secondary0")
    with closing(Node(authority.issue("finisher"))) as node, sending(node.member, own, queue.SimpleQueue()) as sender:
        assert not connect(Purpose.BATCHES, "secondary0", node.member, own, EPOCH)
        sender.send(Piece(batch_id=5))
        assert node.arrived.get(timeout=20).batch_id == 5


def test_a_node_that_is_not_who_was_configured_gets_nothing(authority: Authority) -> None:
    with closing(Node(authority.issue("secondary1"))) as node:
        assert not connect(Purpose.BATCHES, "secondary0", node.member, authority.issue("secondary0"), EPOCH)
        assert node.receiver is None


@pytest.mark.parametrize("silent", [True, False])
def test_a_port_that_cannot_be_reached_costs_little_and_is_named(
    silent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(direct_link, "GREET_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not silent:
            server.close()
        assert not connect(Purpose.BATCHES, "secondary0", Member("finisher", "127.0.0.1", port), None, EPOCH)
    reason = "it does not answer" if silent else "Connection refused"
    assert f"batches go over gRPC, which is slower: node finisher cannot be reached at 127.0.0.1:{port} ({reason})" in (
        caplog.text
    )
    assert connect(Purpose.BATCHES, "secondary0", Member("finisher", "127.0.0.1", 0), None, EPOCH) is None


def test_a_hello_of_a_group_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with closing(Node(None)) as node, socket.create_connection((node.host, node.member.port)) as connection:
        connection.sendall(Hello(EPOCH, 0, 2, "secondary0", b"", 0).encode())
        assert connection.recv(HELLO.size) == b""
        wait_for(lambda: "nobody is awaited here for rank" in caplog.text)


def test_what_passes_is_encrypted(authority: Authority) -> None:
    secret = b"hidden states of a prompt" * 9
    for identities in ((None, None), (authority.issue("finisher"), authority.issue("secondary0"))):
        with closing(Node(identities[0])) as node, closing(RecordingProxy(f"127.0.0.1:{node.member.port}")) as proxy:
            there = Member("finisher", "127.0.0.2", proxy.port)
            with sending(there, identities[1], queue.SimpleQueue()) as sender:
                sender.send(Piece(data=secret))
                assert node.arrived.get(timeout=20).data == secret
            assert any(secret in stream for stream in proxy.recorded) == (identities[0] is None)
            assert proxy.passed_bytes > len(secret)
