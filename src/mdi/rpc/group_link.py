"""The links of one rank to the others of its group: `core.group.Group` over sockets that the compute thread drives."""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from mdi.core.batch import Batch
from mdi.core.dtypes import parse_dtype
from mdi.core.errors import CheckpointError, LinkError
from mdi.core.group import Rank
from mdi.rpc import codec, node_pb2
from mdi.rpc.channel import MAX_MESSAGE_BYTES
from mdi.rpc.group_join import LinkListener, Member, join
from mdi.rpc.peer import HEADER, JOINED_BYTES, Frame, Kind, Peer, Reading
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic

SPIN_S = 100e-6  # longer than a rank waits for another within a step, as a rule; waking from sleep takes 10 to 50 us
DONE = object()
PARTIALS = int(Kind.PARTIALS)


class GroupLink:
    """A `Group`. One thread calls it; any thread may close it. After an error it is of no more use.

    Waits for slow ranks as long as it takes: who is gone is noticed elsewhere, and the link is closed then.
    spins: whether it looks for bytes again and again before it sleeps, which takes a core. traffic: bytes so far.
    """

    def __init__(self, rank: Rank, peers: Sequence[Peer], traffic: Traffic, *, spins: bool) -> None:
        """peers: in the order of their shards."""
        self.rank = rank
        self.traffic = traffic
        self._peers = peers
        self._spin_s = SPIN_S if spins else 0.0
        self._sequence = 0
        self._readings: dict[Peer, deque[Reading[None]]] = {peer: deque() for peer in peers}
        self._awaited: list[_Sums] = []
        self._small: SmallExchange | None = None
        self._error: LinkError | None = None
        self._in_use = threading.Lock()
        self._wakes, self._wake = socket.socketpair()

    @classmethod
    def join(
        cls,
        index: int,
        members: Sequence[Member],
        shares: Sequence[Rank],
        listener: LinkListener | None,
        identity: Identity | None,
        epoch: int,
        timeout_s: float,
        traffic: Traffic | None = None,
    ) -> GroupLink:
        """Connects this rank, members[index], with all others, and waits until all are there. Closes the listener.

        shares: the rank of each member. listener: None for the first member, which nobody connects to. traffic: counts
        on; None begins at nothing. Raises LinkError, naming a node, when one is missing after the timeout, or is not
        who it should be.
        """
        joined = join(index, members, listener, identity, epoch, timeout_s)
        traffic = traffic or Traffic()
        peers = [Peer(members[one].id, shares[one], joined.connections[one], traffic) for one in joined.connections]
        return cls(shares[index], peers, traffic, spins=joined.has_core)

    def close(self, reason: str = "the group was closed") -> None:
        """Ends all connections, and wakes the thread that waits: it raises LinkError. Safe to call twice."""
        self._error = self._error or LinkError(reason)
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        for peer in self._peers:
            peer.shut()
        with self._in_use:
            for peer in self._peers:
                peer.close()
            self._wakes.close()
            self._wake.close()

    def lead(self, batch: Batch, hidden: Tensor) -> None:
        """See `Group`."""
        header = codec.encode_header(batch.without_adjustments(), hidden)
        message = node_pb2.BatchPiece(batch_id=batch.id, header=header).SerializeToString()
        tensors = [tensor.cpu().contiguous() for tensor in codec.tensors(batch, hidden)]
        size_bytes = len(message) + sum(tensor.nbytes for tensor in tensors)
        with self._in_use:
            frame = Frame(Kind.BATCH, len(message), self._next(), size_bytes)
            self._put(frame.message(memoryview(message), *map(_bytes, tensors)))
            self._finish()

    def follow(self) -> tuple[Batch, Tensor]:
        """See `Group`."""
        with self._in_use:
            arrived: list[tuple[Batch, Tensor]] = []
            self._readings[self._peers[0]].append(self._read_batch(self._peers[0], self._next(), arrived))
            self._finish()
        return arrived[0]

    def exchange(self, partials: Tensor) -> None:
        """See `Group`."""
        with self._in_use:
            small = self._small
            if small and small.partials is partials:
                self._exchange_small(small)
            elif _is_small(partials, self.rank, self._peers):
                self._small = SmallExchange(partials, self.rank, self._peers)
                self._exchange_small(self._small)
            else:
                self._send(partials, slice(0, partials.shape[1]))
                self._receive(partials, partials.shape[1])

    def send(self, partials: Tensor, rows: slice) -> None:
        """See `Group`."""
        with self._in_use:
            self._send(partials, rows)

    def receive(self, partials: Tensor, last_row: int) -> None:
        """See `Group`."""
        with self._in_use:
            self._receive(partials, last_row)

    def _exchange_small(self, small: SmallExchange) -> None:
        sequence = self._next()
        try:
            if self._error:
                raise self._error
            late = small.run(sequence, self._spin_s)
        except LinkError as error:
            self._fail(error)
        if late:
            sums = _Sums(small.partials, sequence)
            for peer in late:
                self._readings[peer].append(self._read_partials(peer, sums))
            self._finish()

    def _send(self, partials: Tensor, rows: slice) -> None:
        _, n_rows, n_outputs = partials.shape
        row_bytes, own = n_outputs * partials.itemsize, self.rank
        if rows.start == 0:
            self._await(_Sums(partials, self._next()))
        parts = _parts(_bytes(partials), own, n_rows, row_bytes, rows.start, rows.stop)
        size_bytes = len(own.shards) * (rows.stop - rows.start) * row_bytes
        self._put(Frame(Kind.PARTIALS, rows.start, self._sequence, size_bytes).message(*parts))
        self._move()

    def _await(self, sums: _Sums) -> None:
        self._awaited.append(sums)
        for peer in self._peers:
            sums.rows[peer] = 0
            self._readings[peer].append(self._read_partials(peer, sums))

    def _receive(self, partials: Tensor, last_row: int) -> None:
        sums = next(sums for sums in self._awaited if sums.partials is partials)
        while min(sums.rows.values()) < last_row:
            self._wait()
            self._move()
        if last_row == partials.shape[1]:
            self._awaited.remove(sums)
        if not self._awaited:
            self._finish()

    def gather(self, columns: Tensor) -> list[Tensor] | None:
        """See `Group`."""
        with self._in_use:
            sequence = self._next()
            if not self.rank.leads:
                leader = self._peers[0]
                leader.put(Frame(Kind.COLUMNS, 0, sequence, columns.nbytes).message(_bytes(columns)))
                self._finish()
                return None
            arrived: dict[Peer, Tensor] = {}
            for peer in self._peers:
                self._readings[peer].append(self._read_columns(peer, sequence, columns, arrived))
            self._finish()
        return [columns, *(arrived[peer] for peer in self._peers)]

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _put(self, message: list[memoryview]) -> None:
        for peer in self._peers:
            peer.put(message)

    def _finish(self) -> None:
        """Until all is written and read."""
        self._move()
        while any(self._readings.values()) or any(peer.writes for peer in self._peers):
            self._wait()
            self._move()

    def _move(self) -> None:
        """Writes and reads what can be, now."""
        try:
            if self._error:
                raise self._error
            for peer, readings in self._readings.items():
                peer.write()
                while readings and next(readings[0], DONE) is DONE:
                    readings.popleft()
        except LinkError as error:
            self._fail(error)

    def _fail(self, error: LinkError) -> NoReturn:
        self._error = self._error or error
        raise self._error from None

    def _wait(self) -> None:
        """Until there is something to write or to read, or `close` was called."""
        poll = select.poll()
        poll.register(self._wakes, select.POLLIN)
        for peer, readings in self._readings.items():
            poll.register(peer, select.POLLIN * bool(readings) | select.POLLOUT * peer.writes)
        until_s = time.perf_counter() + self._spin_s
        while not poll.poll(0):
            if time.perf_counter() >= until_s:
                poll.poll()
                return

    def _read_batch(self, peer: Peer, sequence: int, arrived: list[tuple[Batch, Tensor]]) -> Reading[None]:
        frame = yield from peer.read_frame(Kind.BATCH, sequence)
        if not 0 < frame.start <= min(frame.size_bytes, MAX_MESSAGE_BYTES):
            raise peer.out_of_step(f"a batch with a header of {frame.start} bytes")
        message = bytearray(frame.start)
        yield from peer.read(memoryview(message))
        try:
            piece = node_pb2.BatchPiece.FromString(bytes(message))
            dtype = parse_dtype(piece.header.dtype)
            size_bytes = codec.checked_bytes(piece.header, piece.header.width, dtype)
        except (DecodeError, CheckpointError, LinkError) as error:
            raise LinkError(f"node {peer.node} sent a batch that cannot be read: {error}", peer.node) from None
        if size_bytes != frame.size_bytes - frame.start:
            raise peer.out_of_step(f"{frame.size_bytes - frame.start} bytes for {size_bytes}")
        data = torch.empty(size_bytes, dtype=torch.uint8)
        yield from peer.read(_bytes(data))
        arrived.append(codec.decode_batch(piece.batch_id, piece.header, data.view(dtype)))

    @staticmethod
    def _read_partials(peer: Peer, sums: _Sums) -> Reading[None]:
        partials = sums.partials
        _, n_rows, n_outputs = partials.shape
        data, row_bytes, row = _bytes(partials), n_outputs * partials.itemsize, 0
        while row < n_rows:
            frame = yield from peer.read_frame(Kind.PARTIALS, sums.sequence)
            count, odd = divmod(frame.size_bytes, len(peer.rank.shards) * row_bytes)
            if odd or frame.start != row or not 0 < count <= n_rows - row:
                what = f"{frame.size_bytes} bytes of partial sums from row {frame.start} on"
                raise peer.out_of_step(f"{what}, and row {row} of {n_rows} was next, with {row_bytes} bytes a shard")
            for part in _parts(data, peer.rank, n_rows, row_bytes, row, row + count):
                yield from peer.read(part)
            row += count
            sums.rows[peer] = row

    def _read_columns(self, peer: Peer, sequence: int, own: Tensor, arrived: dict[Peer, Tensor]) -> Reading[None]:
        """Shards have nearly the same number of columns: far more is an error, and never memory."""
        frame = yield from peer.read_frame(Kind.COLUMNS, sequence)
        n_columns, odd = divmod(frame.size_bytes, len(own) * own.itemsize)
        most = 2 * (own.shape[1] + 64) * max(1, len(peer.rank.shards) / len(self.rank.shards))
        if odd or n_columns > most:
            raise peer.out_of_step(f"{frame.size_bytes} bytes of columns for {len(own)} rows")
        columns = own.new_empty(len(own), n_columns)
        yield from peer.read(_bytes(columns))
        arrived[peer] = columns


@dataclass(eq=False)
class _Sums:
    """Partial sums that come from other ranks. rows: of each, how many are there, from the first on."""

    partials: Tensor
    sequence: int
    rows: dict[Peer, int] = field(default_factory=dict)


class SmallExchange:
    """Exchanges of one tensor whose frames are small, as a step of decoding has them: twice a layer.

    Weights are read between two of them, after which all code takes several times as long, as from cold caches. So all
    that can be is prepared, few functions are called, and a frame is one write and one read.
    """

    def __init__(self, partials: Tensor, rank: Rank, peers: Sequence[Peer]) -> None:
        self.partials = partials
        self._peers = peers
        self._own = _whole_part(partials, rank)
        self._message = memoryview(bytearray(HEADER.size + len(self._own)))
        self._content = self._message[HEADER.size :]
        self._arrivals = [_Arrival.of(peer, _whole_part(partials, peer.rank)) for peer in peers]

    def run(self, sequence: int, spin_s: float) -> list[Peer]:
        """Sends, and receives what comes while it spins. Returns the peers whose frames are still to be read.

        All of them, where something is left to be written.
        """
        HEADER.pack_into(self._message, 0, PARTIALS, 0, sequence, len(self._own))
        self._content[:] = self._own
        sent = True
        for peer in self._peers:
            sent = peer.send(self._message) and sent
        if not sent:
            return [*self._peers]
        late = []
        for peer, frame, content, target in self._arrivals:
            n_bytes = peer.receive(frame) if peer.spin(spin_s) else None
            if n_bytes == len(frame) and HEADER.unpack_from(frame) == (PARTIALS, 0, sequence, len(target)):
                target[:] = content
                continue
            if n_bytes:
                peer.unread(frame[:n_bytes])
            late.append(peer)
        return late


class _Arrival(NamedTuple):
    """The frame of a peer, its content, and where that belongs."""

    peer: Peer
    frame: memoryview
    content: memoryview
    target: memoryview

    @classmethod
    def of(cls, peer: Peer, target: memoryview) -> _Arrival:
        frame = memoryview(bytearray(HEADER.size + len(target)))
        return cls(peer, frame, frame[HEADER.size :], target)


def _is_small(partials: Tensor, rank: Rank, peers: Sequence[Peer]) -> bool:
    """Whether every rank's frame is small."""
    most = max(len(rank.shards), *(len(peer.rank.shards) for peer in peers))
    return most * partials[0].nbytes <= JOINED_BYTES


def _whole_part(partials: Tensor, rank: Rank) -> memoryview:
    """All rows of a rank's shards."""
    _, n_rows, n_outputs = partials.shape
    return _parts(_bytes(partials), rank, n_rows, n_outputs * partials.itemsize, 0, n_rows)[0]


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which must stay in use meanwhile. A quarter of numpy's time."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _parts(data: memoryview, rank: Rank, n_rows: int, row_bytes: int, start: int, stop: int) -> list[memoryview]:
    """Rows [start, stop) of a rank's shards, in [n_shards, n_rows, row_bytes]. In one piece where they lie so."""
    shard_bytes = n_rows * row_bytes
    if stop - start == n_rows:
        return [data[rank.first_shard * shard_bytes : rank.last_shard * shard_bytes]]
    begins = (shard * shard_bytes for shard in rank.shards)
    return [data[begin + start * row_bytes : begin + stop * row_bytes] for begin in begins]
