"""The links between the ranks of a group, over real sockets: all get all partial sums, and only ranks get in."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from mdi.core.batch import Batch, Copy, Deepstack, LogitAdjustment, Release, Slice, TokenSampling
from mdi.core.errors import LinkError
from mdi.core.group import Rank
from mdi.rpc import node_pb2
from mdi.rpc.authority import Authority
from mdi.rpc.group_join import HELLO, Hello, LinkListener, Member
from mdi.rpc.group_link import GroupLink
from mdi.rpc.peer import HEADER, Frame, Kind
from mdi.rpc.tls import Identity

S = TypeVar("S")
T = TypeVar("T")
NAMES = ("starter", "secondary0", "secondary1", "finisher")
SHARES = {2: ((0, 2), (2, 4)), 3: ((0, 2), (2, 3), (3, 4)), 4: ((0, 1), (1, 2), (2, 3), (3, 4))}
EPOCH, TIMEOUT_S = 7, 20.0


def ranks(*bounds: tuple[int, int]) -> list[Rank]:
    return [Rank(first, last, bounds[-1][1]) for first, last in bounds]


def on_all(items: Iterable[S], call: Callable[[S], T]) -> list[T]:
    """What the call returns for each, all at once, each in its own thread."""
    with ThreadPoolExecutor() as pool:
        return [future.result(60) for future in [pool.submit(call, item) for item in items]]


@contextmanager
def group(shares: Sequence[Rank], authority: Authority | None) -> Iterator[list[GroupLink]]:
    """The ranks of a group in this process."""
    identities = [authority.issue(name) if authority else None for name in NAMES[: len(shares)]]
    listeners = [LinkListener(identity, "127.0.0.1") if number else None for number, identity in enumerate(identities)]
    members = members_of(listeners)

    def join(index: int) -> GroupLink:
        return GroupLink.join(index, members, shares, listeners[index], identities[index], EPOCH, TIMEOUT_S)

    links = on_all(range(len(shares)), join)
    try:
        yield links
    finally:
        for link in links:
            link.close()


def members_of(listeners: Sequence[LinkListener | None]) -> list[Member]:
    return [
        Member(name, "127.0.0.1", listener.port if listener else 0)
        for name, listener in zip(NAMES, listeners, strict=False)
    ]


@pytest.fixture(params=["encrypted", "plain"])
def security(request: pytest.FixtureRequest, authority: Authority) -> Authority | None:
    return authority if request.param == "encrypted" else None


def partials_of(n_shards: int, n_rows: int, dtype: torch.dtype, width: int = 96) -> Tensor:
    torch.manual_seed(n_rows)
    return torch.randn(n_shards, n_rows, width).to(dtype)


def exchanged(link: GroupLink, whole: Tensor, *ends: int) -> Tensor:
    """What a rank has after an exchange, of which it knew only its own shards. ends: of the pieces but the last."""
    own = slice(link.rank.first_shard, link.rank.last_shard)
    partials = torch.full_like(whole, float("nan"))
    for start, end in pairwise((0, *ends, whole.shape[1])):
        partials[own, start:end] = whole[own, start:end]
        link.send(partials, slice(start, end))
    for end in (*ends, whole.shape[1]):
        link.receive(partials, end)
    return partials


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bounds", [SHARES[2], SHARES[3], SHARES[4], ((0, 1), (1, 4)), ((0, 5), (5, 6), (6, 8))])
def test_every_rank_gets_the_partial_sums_of_all(bounds: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
    with group(ranks(*bounds), None) as links:
        for n_rows in (1, 3, 40, 1):
            whole = partials_of(bounds[-1][1], n_rows, dtype)
            for found in on_all(links, partial(exchanged, whole=whole)):
                assert torch.equal(found, whole)


@pytest.mark.parametrize("width", [3, 96])  # frames that are small, and not
def test_rows_may_go_in_pieces_of_which_each_rank_has_its_own(width: int, security: Authority | None) -> None:
    whole = partials_of(4, 100, torch.bfloat16, width)
    ends = {0: (), 2: (1, 99), 3: (30, 60)}  # by the first shard of a rank
    with group(ranks(*SHARES[3]), security) as links:
        for found in on_all(links, lambda link: exchanged(link, whole, *ends[link.rank.first_shard])):
            assert torch.equal(found, whole)


def test_one_tensor_is_exchanged_again_and_again(security: Authority | None) -> None:
    """As layers do, with other numbers each time; in pieces, too."""
    torch.manual_seed(2)
    wholes = torch.randn(6, 4, 3, 96)

    def exchange(link: GroupLink) -> Tensor:
        own, partials, found = slice(link.rank.first_shard, link.rank.last_shard), torch.empty(4, 3, 96), []
        for number, whole in enumerate(wholes):
            partials.fill_(float("nan"))
            partials[own] = whole[own]
            if number in (0, 3):
                link.send(partials, slice(0, 1))
                link.send(partials, slice(1, 3))
                link.receive(partials, 3)
            else:
                link.exchange(partials)
            found.append(partials.clone())
        return torch.stack(found)

    with group(ranks(*SHARES[3]), security) as links:
        for found in on_all(links, exchange):
            assert torch.equal(found, wholes)


def test_rows_of_the_next_tensor_may_be_sent_before_all_of_this_one_are_there(security: Authority | None) -> None:
    """As layers do with many rows: two tensors in turn, more bytes than a connection takes at once."""
    torch.manual_seed(3)
    wholes, ends = torch.randn(5, 4, 40, 9000), (0, 16, 32, 40)
    pieces = [slice(*pair) for pair in pairwise(ends)]

    def exchanges(link: GroupLink) -> Tensor:
        own, found = slice(link.rank.first_shard, link.rank.last_shard), []
        before, tensor = torch.empty(0), torch.empty(2, *wholes.shape[1:])
        for number, whole in enumerate(wholes):
            partials = tensor[number % 2]
            for rows in pieces:
                if number:
                    link.receive(before, rows.stop)
                    found.append(before[:, rows].clone())
                partials[own, rows] = whole[own, rows]
                link.send(partials, rows)
            before = partials
        link.receive(before, 40)
        return torch.cat([*found, before], 1)

    with group(ranks(*SHARES[3]), security) as links:
        for found in on_all(links, exchanges):
            assert torch.equal(found, torch.cat(list(wholes), 1))


def test_a_rank_that_does_not_read_for_a_while_gets_all(security: Authority | None) -> None:
    """Small frames that the connection does not take at once."""
    n_times, partials = 100, torch.zeros(4, 1, 1800)  # frames of 14 kB
    with group(ranks(*SHARES[2]), security) as [link, other], ThreadPoolExecutor() as pool:
        peer, connection = link._peers[0], other._peers[0]._connection
        peer._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)
        taken, send = list[bool](), peer.send
        peer.send = lambda data: taken.append(send(data)) or taken[-1]  # type: ignore[method-assign, func-returns-value]

        def exchanges() -> None:
            for number in range(n_times):
                partials[:2] = number
                link.exchange(partials)
                assert (partials[2:] == -number).all()

        waiting = pool.submit(exchanges)
        connection.setblocking(True)
        for number in range(n_times):
            frame = Frame(Kind.PARTIALS, 0, number + 1, partials.nbytes // 2)
            connection.sendall(HEADER.pack(*frame) + torch.full_like(partials[:2], -number).numpy().tobytes())
        while False not in taken:
            assert not waiting.done()
            time.sleep(0.001)
        for number in range(n_times):
            assert Frame(*HEADER.unpack(received(connection, HEADER.size))).sequence == number + 1
            content = torch.frombuffer(bytearray(received(connection, partials.nbytes // 2)), dtype=torch.float32)
            assert (content == number).all()
        waiting.result(10)


def received(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        assert more
        data += more
    return data


def test_megabytes_both_ways_at_once_block_nobody(security: Authority | None) -> None:
    whole = partials_of(2, 2048, torch.float32, width=1024)  # 8 MiB a shard
    with group(ranks((0, 1), (1, 2)), security) as links:
        for found in on_all(links, lambda link: exchanged(link, whole, 512, 1024, 1536)):
            assert torch.equal(found, whole)
        traffic = links[0].traffic
        assert traffic.sent_bytes == traffic.received_bytes == whole.nbytes // 2 + 4 * HEADER.size


def a_batch(dtype: torch.dtype) -> tuple[Batch, Tensor]:
    bias = LogitAdjustment(1.1, 0.0, 0.0, bytes(19_000), b"", b"", (5,), (0.5,))
    drawn = TokenSampling(0.7, 40, 0.9, 0.0, 3, 0, 9, 2, bias, b"\1")
    slices = Slice(0, 5, 300), Slice(3, 17, 2, (drawn, drawn)), Slice(1, 0, 1, (drawn,))
    torch.manual_seed(0)
    deepstack = Deepstack(torch.arange(3, 290), torch.randn(2, 287, 64).to(dtype), first_layer=5)
    edits = (Release(3, 0), Copy(1, 2, 30_000))
    return Batch(12, slices, torch.randint(0, 10**6, (3, 303)), edits, deepstack), torch.randn(303, 64).to(dtype)


def given(link: GroupLink, batch: Batch, hidden: Tensor) -> tuple[Batch, Tensor]:
    """What a rank computes: rank 0 has it and gives it to the others."""
    if not link.rank.leads:
        return link.follow()
    link.lead(batch, hidden)
    return batch, hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_others_follow_with_the_batch_that_the_first_rank_leads(
    dtype: torch.dtype, security: Authority | None
) -> None:
    batch, hidden = a_batch(dtype)
    deepstack = batch.deepstack
    assert deepstack
    with group(ranks(*SHARES[3]), security) as links:
        for got, got_hidden in on_all(links, partial(given, batch=batch, hidden=hidden)):
            assert torch.equal(got_hidden, hidden)
            assert got_hidden.dtype == dtype
            assert (got.id, got.edits, got.sampled_rows) == (batch.id, batch.edits, batch.sampled_rows)
            assert torch.equal(got.positions, batch.positions)
            assert [(part.slot, part.start, part.length) for part in got.slices] == [(0, 5, 300), (3, 17, 2), (1, 0, 1)]
            assert got.deepstack
            assert torch.equal(got.deepstack.rows, deepstack.rows)
            assert torch.equal(got.deepstack.features, deepstack.features)
            assert got.deepstack.first_layer == 5
        assert links[0].traffic.sent_bytes < 2 * (hidden.nbytes + deepstack.features.nbytes + 19_000)


@pytest.mark.parametrize("n_rows", [1, 5, 300])
def test_the_first_rank_gathers_all_columns(n_rows: int, security: Authority | None) -> None:
    torch.manual_seed(1)
    logits, columns = torch.randn(n_rows, 1001).to(torch.bfloat16), {0: (0, 500), 2: (500, 750), 3: (750, 1001)}
    with group(ranks(*SHARES[3]), security) as links:
        whole, *others = on_all(
            links, lambda link: link.gather(logits[:, slice(*columns[link.rank.first_shard])].contiguous())
        )
        assert whole is not None
        assert torch.equal(torch.cat(whole, 1), logits)
        assert others == [None, None]


def test_a_step_of_all_calls_with_ranks_that_are_slow_by_turns(security: Authority | None) -> None:
    whole = partials_of(4, 3, torch.bfloat16)
    batch, hidden = a_batch(torch.bfloat16)

    def steps(link: GroupLink) -> bool:
        equal = True
        for number in range(10):
            equal &= torch.equal(given(link, batch, hidden)[1], hidden)
            for layer in range(4):
                if (number + layer) % 3 == link.rank.first_shard % 3:
                    time.sleep(0.001)
                equal &= torch.equal(exchanged(link, whole), whole)
            link.gather(hidden)
        return equal

    with group(ranks(*SHARES[3]), security) as links:
        assert on_all(links, steps) == [True] * 3


@contextmanager
def joining(
    identities: Sequence[Identity | None], *, epoch: int = EPOCH, timeout_s: float = TIMEOUT_S
) -> Iterator[tuple[list[Member], Future[GroupLink]]]:
    """The last rank of a group waits for the others; gives the members and what becomes of it."""
    listeners = [None] * (len(identities) - 1) + [LinkListener(identities[-1], "127.0.0.1")]
    members, last = members_of(listeners), len(listeners) - 1
    shares = ranks(*SHARES[len(listeners)])
    with ThreadPoolExecutor() as pool:
        future = pool.submit(GroupLink.join, last, members, shares, listeners[-1], identities[-1], epoch, timeout_s)
        try:
            yield members, future
        finally:
            with suppress(LinkError):
                future.result(30).close()


def join_first(
    members: Sequence[Member], identity: Identity | None, epoch: int = EPOCH, index: int = 0, timeout_s: float = 5.0
) -> GroupLink:
    shares = ranks(*SHARES[len(members)])
    return GroupLink.join(index, members, shares, None, identity, epoch, timeout_s)


@pytest.mark.parametrize("case", ["stranger", "other node", "no certificate", "plain text", "silent", "other epoch"])
def test_who_does_not_belong_to_the_group_is_refused_and_keeps_nobody_waiting(
    case: str, authority: Authority, stranger: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    starter, finisher = authority.issue("starter"), authority.issue("secondary0")
    with joining([starter, finisher]) as (members, waiting):
        place = ("127.0.0.1", members[1].port)
        with ExitStack() as stack:
            if case == "stranger":
                trusting = replace(stranger.issue("starter"), authority=authority.pem)
                said = refusal(lambda: join_first(members, trusting))
                assert "ended the connection: its log has the reason" in said or "no encrypted connection" in said
                expected = "its certificate is not accepted"
            elif case == "other node":
                refusal(lambda: join_first(members, authority.issue("vision")))
                expected = "it has the certificate of vision, not of starter"
            elif case == "other epoch":
                refusal(lambda: join_first(members, starter, epoch=EPOCH - 1))
                expected = f"it is in epoch {EPOCH - 1}, not in {EPOCH}"
            elif case == "silent":
                stack.enter_context(socket.create_connection(place))
                expected = ""
            elif case == "plain text":
                connection = stack.enter_context(socket.create_connection(place))
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                expected = "no encrypted connection with a certificate of this cluster"
            else:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                connection = stack.enter_context(socket.create_connection(place))
                encrypted = stack.enter_context(context.wrap_socket(connection))
                with suppress(OSError):
                    encrypted.recv(1)
                expected = "no encrypted connection with a certificate of this cluster"
            link = join_first(members, starter)
            link.close()
        waiting.result(30).close()
    assert expected in caplog.text
    assert bool(expected) == ("refused a connection from 127.0.0.1:" in caplog.text)


def refusal(join: Callable[[], GroupLink]) -> str:
    """Why this side could not join; names the node that refused."""
    with pytest.raises(LinkError) as error:
        join()
    assert error.value.node == "secondary0"
    return str(error.value)


@pytest.mark.parametrize(
    ("hello", "expected"),
    [
        (Hello(EPOCH, 2, 3, "secondary1", b"", 0), "rank 2 does not connect to rank 2"),
        (Hello(EPOCH, 0, 4, "starter", b"", 0), "it is rank 0 of 4, node starter, not rank 0 of 3, node starter"),
        (Hello(EPOCH, 0, 3, "vision", b"", 0), "it is rank 0 of 3, node vision, not rank 0 of 3, node starter"),
        (Hello(EPOCH + 1, 0, 3, "starter", b"", 0), f"it is in epoch {EPOCH + 1}, not in {EPOCH}"),
        (Hello(EPOCH, 1, 3, "secondary0", b"", 0), "rank 1, node secondary0, is here already"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused(hello: Hello, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    with joining([None] * 3, timeout_s=0.5) as (members, waiting):
        place = ("127.0.0.1", members[2].port)
        with socket.create_connection(place) as first, socket.create_connection(place) as second:
            first.sendall(Hello(EPOCH, 1, 3, "secondary0", b"", 0).encode())
            assert first.recv(HELLO.size)
            second.sendall(hello.encode())
            assert second.recv(1) == b""
        with pytest.raises(LinkError, match="node starter did not connect to secondary1") as error:
            waiting.result(30)
        assert error.value.node == "starter"
    assert expected in caplog.text


def test_ranks_with_one_certificate_are_no_group() -> None:
    with pytest.raises(LinkError, match="the nodes of a group need certificates of their own, and these are a, a"):
        join_first([Member("a"), Member("a", "127.0.0.1", 1)], None)


def test_a_rank_that_is_missing_is_named(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        members = [Member("starter"), Member("secondary0", "127.0.0.1", silent.getsockname()[1])]
        with pytest.raises(LinkError, match=r"secondary0 does not answer at 127\.0\.0\.1:\d+: is that port") as error:
            join_first(members, authority.issue("starter"), timeout_s=0.3)
    assert error.value.node == "secondary0"


def test_a_listener_that_is_closed_ends_the_wait() -> None:
    listener = LinkListener(None, "127.0.0.1")
    members = [Member("starter"), Member("finisher")]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(GroupLink.join, 1, members, ranks(*SHARES[2]), listener, None, EPOCH, 60.0)
        with socket.create_connection(("127.0.0.1", listener.port)) as garbage:  # refused when the join has begun
            garbage.sendall(b"x" * 64)
            assert garbage.recv(1) == b""
        listener.close()
        with pytest.raises(LinkError, match="the listener was closed"):
            waiting.result(30)


def test_a_port_that_cannot_be_bound_is_an_error() -> None:
    with pytest.raises(LinkError, match=r"no port can be opened on '192\.0\.2\.1' for links"):
        LinkListener(None, "192.0.2.1")


def test_a_port_that_is_asked_for_is_taken_if_it_is_free(caplog: pytest.LogCaptureFixture) -> None:
    with LinkListener(None, "127.0.0.1") as other:
        wanted = other.port
        with LinkListener(None, "127.0.0.1", wanted) as listener:
            assert listener.port not in (0, wanted)
        assert f"port {wanted} cannot be opened for links (Address already in use)" in caplog.text
    with LinkListener(None, "127.0.0.1", wanted) as listener:
        assert listener.port == wanted


@pytest.mark.parametrize("waits", ["exchange", "follow", "gather"])
def test_closing_wakes_the_thread_that_waits(waits: str, security: Authority | None) -> None:
    with group(ranks(*SHARES[2]), security) as [leader, follower], ThreadPoolExecutor() as pool:
        partials = torch.zeros(4, 1, 8)
        link = leader if waits == "gather" else follower
        calls: dict[str, Callable[[], object]] = {
            "follow": link.follow,
            "exchange": lambda: link.exchange(partials),
            "gather": lambda: link.gather(partials[0]),
        }
        waiting = pool.submit(calls[waits])
        time.sleep(0.01)
        link.close("node finisher was lost")
        with pytest.raises(LinkError, match="node finisher was lost"):
            waiting.result(10)
        with pytest.raises(LinkError, match="node finisher was lost"):
            link.exchange(partials)


def test_the_others_learn_that_a_rank_is_gone(security: Authority | None) -> None:
    """In the middle of an exchange in pieces."""
    with group(ranks(*SHARES[3]), security) as links, ThreadPoolExecutor() as pool:
        partials = torch.zeros(4, 10, 8)
        links[1].send(partials.clone(), slice(0, 4))
        waiting = [pool.submit(link.exchange, partials.clone()) for link in (links[0], links[2])]
        links[1].close()
        for one in waiting:
            with pytest.raises(LinkError, match="node secondary0") as error:
                one.result(10)
            assert error.value.node == "secondary0"


@contextmanager
def forger() -> Iterator[tuple[GroupLink, socket.socket]]:
    """A rank, rank 1 of two, and the raw connection of another one that is really a test."""
    with joining([None, None]) as (members, waiting):
        with socket.create_connection(("127.0.0.1", members[1].port)) as raw:
            raw.sendall(Hello(EPOCH, 0, 2, "starter", b"", 0).encode())
            link = waiting.result(10)
            assert len(raw.recv(HELLO.size, socket.MSG_WAITALL)) == HELLO.size
            yield link, raw
        link.close()


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (Frame(Kind.PARTIALS, 0, 2, 64), "it sent partials 2, not partials 1"),
        (Frame(Kind.BATCH, 0, 1, 64), "it sent batch 1, not partials 1"),
        (Frame(99, 0, 1, 64), "it sent kind 99 1, not partials 1"),
        (Frame(Kind.PARTIALS, 1, 1, 64), "it sent 64 bytes of partial sums from row 1 on, and row 0 of 3 was next"),
        (Frame(Kind.PARTIALS, 0, 1, 60), "it sent 60 bytes of partial sums"),
        (Frame(Kind.PARTIALS, 0, 1, 0), "it sent 0 bytes of partial sums"),
        (Frame(Kind.PARTIALS, 0, 1, 2**63), "it sent 9223372036854775808 bytes of partial sums"),
    ],
)
def test_a_rank_out_of_step_is_an_error_and_not_nonsense(frame: Frame, expected: str) -> None:
    with forger() as (link, raw):
        raw.sendall(HEADER.pack(*frame) + bytes(64))
        with pytest.raises(LinkError, match=f"node starter is out of step with its group: {expected}") as error:
            link.exchange(torch.zeros(4, 3, 8))
        assert error.value.node == "starter"


@pytest.mark.parametrize("first", [10, HEADER.size, 100])
def test_a_small_frame_may_come_in_parts(first: int) -> None:
    own, others = torch.ones(2, 3, 8), torch.full((2, 3, 8), 2.0)
    frame = HEADER.pack(Kind.PARTIALS, 0, 1, others.nbytes) + others.numpy().tobytes()
    with forger() as (link, raw), ThreadPoolExecutor() as pool:
        partials = torch.cat([torch.zeros_like(others), own])
        raw.sendall(frame[:first])
        waiting = pool.submit(link.exchange, partials)
        assert received(raw, len(frame))[HEADER.size :] == own.numpy().tobytes()
        raw.sendall(frame[first:])
        waiting.result(10)
        assert torch.equal(partials, torch.cat([others, own]))


def a_header(**changes: object) -> bytes:
    """The message at the head of a batch of one token."""
    fields: dict[str, Any] = {
        "slices": [node_pb2.Slice(length=1)],
        "positions": [0] * 3,
        "dtype": "float32",
        "width": 8,
    }
    return node_pb2.BatchPiece(header=node_pb2.BatchHeader(**{**fields, **changes})).SerializeToString()


@pytest.mark.parametrize(
    ("message", "size_bytes", "expected"),
    [
        (b"", 32, "a batch with a header of 0 bytes"),
        (b"\xff" * 40, 32, "sent a batch that cannot be read"),
        (a_header(dtype="float64"), 64, "sent a batch that cannot be read: dtype 'float64' is not supported"),
        (a_header(positions=[0]), 32, "sent a batch that cannot be read: a batch's slices and positions do not add up"),
        (a_header(width=2**31), 2**33, "sent a batch that cannot be read: a batch is larger than"),
        (a_header(), 2**40, "out of step with its group: it sent 1099511627776 bytes for 32"),
        (a_header(), 31, "out of step with its group: it sent 31 bytes for 32"),
    ],
)
def test_a_batch_that_cannot_be_is_an_error_and_takes_no_memory(message: bytes, size_bytes: int, expected: str) -> None:
    with forger() as (link, raw):
        raw.sendall(HEADER.pack(Kind.BATCH, len(message), 1, len(message) + size_bytes) + message)
        with pytest.raises(LinkError, match=expected) as error:
            link.follow()
        assert error.value.node == "starter"


def test_a_batch_with_a_header_of_gigabytes_takes_no_memory() -> None:
    with forger() as (link, raw):
        raw.sendall(HEADER.pack(Kind.BATCH, 2**31, 1, 2**32))
        with pytest.raises(LinkError, match="a batch with a header of 2147483648 bytes"):
            link.follow()


@pytest.mark.parametrize("size_bytes", [33, 2**62, 64 * 4000])
def test_columns_of_a_strange_size_take_no_memory(size_bytes: int) -> None:
    """To the first rank, which connects to the test: it reads its hello, and sends one."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        members = [Member("starter"), Member("secondary0", "127.0.0.1", server.getsockname()[1])]
        waiting = pool.submit(join_first, members, None)
        raw, _ = server.accept()
        with raw:
            raw.sendall(Hello(EPOCH, 1, 2, "secondary0", b"", 0).encode() + HEADER.pack(Kind.COLUMNS, 0, 1, size_bytes))
            link = waiting.result(10)
            with pytest.raises(LinkError, match=f"it sent {size_bytes} bytes of columns for 8 rows"):
                link.gather(torch.zeros(8, 2))
            link.close()


RANK_PROCESS = """
import sys, torch
from mdi.core.errors import LinkError
from mdi.core.group import Rank
from mdi.rpc import node_pb2
from mdi.rpc.group_join import HELLO, LinkListener, Hello, Member
from mdi.rpc.group_link import GroupLink
from mdi.rpc.tls import Identity
identity = Identity.receive(0)
listener = LinkListener(identity, "127.0.0.1")
print(listener.port, flush=True)
shares = [Rank(0, 2, 4), Rank(2, 4, 4)]
link = GroupLink.join(1, [Member("starter"), Member("finisher")], shares, listener, identity, 7, 30.0)
for number in range(200):
    partials = torch.full((4, 2, 64), float(number), dtype=torch.bfloat16)
    link.exchange(partials)
    assert bool((partials[:2] == -number).all()), number
link.follow()
"""


def test_ranks_in_two_processes_one_of_which_is_killed(authority: Authority) -> None:
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-c", RANK_PROCESS], stdin=read, stdout=subprocess.PIPE) as process:
        os.close(read)
        authority.issue("finisher").send(write)
        assert process.stdout
        members = [Member("starter"), Member("finisher", "127.0.0.1", int(process.stdout.readline()))]
        link = join_first(members, authority.issue("starter"), timeout_s=30.0)
        for number in range(200):
            partials = torch.full((4, 2, 64), -float(number), dtype=torch.bfloat16)
            link.exchange(partials)
            assert bool((partials[2:] == number).all())
        process.kill()
        with pytest.raises(LinkError, match="node finisher"):
            link.exchange(torch.zeros(4, 2, 64))
        link.close()
