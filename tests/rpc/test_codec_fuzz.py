"""Bytes of a stranger, or of a broken node, at the wire decoder: a LinkError or a batch, at once, in little memory.

Memory is counted with tracemalloc, in multiples of what arrived.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from mdi.core.batch import Batch, Slice, TokenSampling
from mdi.core.errors import LinkError
from mdi.rpc import channel, codec, node_pb2

WIDTH = 8
MOST_PER_BYTE = 40  # a packed position of one byte becomes 8 in a list and 8 in a tensor
MOST_BESIDES = 2**18
DEADLINE_MS = 2000

numbers = st.sampled_from([0, 1, 2, 3, 2**16, 2**31 - 1, 2**32 - 1]) | st.integers(0, 2**32 - 1)
samplings = st.builds(
    node_pb2.TokenSampling,
    temperature=st.floats(),
    top_k=numbers,
    top_p=st.floats(),
    min_p=st.floats(),
    position=numbers,
)
slices = st.builds(
    node_pb2.Slice, slot=numbers, start=numbers, length=numbers, samplings=st.lists(samplings, max_size=2)
)
headers = st.builds(
    node_pb2.BatchHeader,
    slices=st.lists(slices, max_size=4),
    positions=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=12),
    dtype=st.sampled_from(["float32", "bfloat16", "object", ""]),
    width=st.sampled_from([WIDTH, 0, 2**32 - 1]),
)
strange = st.builds(
    node_pb2.BatchPiece,
    epoch=st.integers(0, 2**64 - 1),
    batch_id=st.integers(0, 3),
    header=st.none() | headers,
    data=st.binary(max_size=200),
    last=st.booleans(),
).map(lambda piece: piece.SerializeToString())


def good_pieces() -> list[bytes]:
    """A batch of three pieces, as a node would send it."""
    parts = (Slice(1, 2, 3), Slice(4, 5, 6, (TokenSampling(1.0, 0, 1.0, 0.0, 1, 2, 3),)))
    batch = Batch(1, parts, torch.arange(27).view(3, 9))
    [whole] = codec.encode_batch(batch, torch.ones(9, WIDTH), epoch=1)
    cut = [whole.data[start : start + 96] for start in range(0, len(whole.data), 96)]
    header, last = [whole.header, None, None], [False, False, True]
    return [
        node_pb2.BatchPiece(epoch=1, batch_id=1, header=head, data=data, last=end).SerializeToString()
        for head, data, end in zip(header, cut, last, strict=True)
    ]


GOOD = good_pieces()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good piece with some bytes replaced, taken out or put in."""
    data = bytearray(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


messages = st.binary(max_size=300) | strange | mutated() | st.sampled_from(GOOD)


def decode(arriving: Sequence[bytes]) -> int:
    """How many batches came out before something was refused."""
    decoder = codec.BatchDecoder(WIDTH, torch.float32)
    batches = 0
    try:
        for data in arriving:
            decoded = decoder.add(node_pb2.BatchPiece.FromString(data))
            if decoded:
                batches += 1
                batch, hidden = decoded
                assert hidden.shape == (batch.n_tokens, WIDTH)
                assert batch.positions.shape == (3, batch.n_tokens)
    except (LinkError, DecodeError):
        pass
    return batches


def peak_bytes(arriving: Sequence[bytes]) -> int:
    tracemalloc.start()
    try:
        decode(arriving)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_the_fuzzing_starts_from_is_a_batch() -> None:
    assert decode(GOOD) == 1


@settings(max_examples=400, deadline=DEADLINE_MS)
@given(arriving=st.lists(messages, min_size=1, max_size=5))
def test_whatever_arrives_is_refused_or_a_batch_in_little_memory(arriving: list[bytes]) -> None:
    assert peak_bytes(arriving) < MOST_PER_BYTE * sum(map(len, arriving)) + MOST_BESIDES


@settings(max_examples=100, deadline=DEADLINE_MS)
@given(order=st.permutations([0, 0, 1, 2, 2]))
def test_pieces_out_of_order_make_no_batch_with_holes(order: list[int]) -> None:
    """A batch has all its bytes, or there is none."""
    assert decode([GOOD[index] for index in order]) <= 1


@settings(max_examples=200, deadline=DEADLINE_MS)
@given(data=st.binary(max_size=300))
def test_no_bytes_crash_the_reading_of_another_message(data: bytes) -> None:
    kinds = (
        node_pb2.BatchResult,
        node_pb2.ConfigureRequest,
        node_pb2.ConfigureReply,
        node_pb2.NodeStatus,
        node_pb2.StatusRequest,
        node_pb2.ResultsRequest,
    )
    for kind in kinds:
        try:
            message = kind.FromString(data)
        except (LinkError, DecodeError):
            continue
        if isinstance(message, node_pb2.BatchResult):
            codec.decode_result(message)


def large_headers() -> dict[str, bytes]:
    """Messages at the limit that declare much more than they bring."""
    room = channel.MAX_MESSAGE_BYTES - 100
    nothing = bytes([0x0A, 0])  # an empty slice
    tokens = room // 4
    huge = node_pb2.BatchHeader(slices=[node_pb2.Slice(length=2**32 - 1)] * 3, dtype="float32", width=WIDTH)
    many = node_pb2.BatchHeader(
        slices=[node_pb2.Slice(length=tokens)], positions=[0] * (3 * tokens), dtype="float32", width=WIDTH
    )
    wide = node_pb2.BatchHeader(slices=[node_pb2.Slice(length=1)], positions=[0] * 3, dtype="float32", width=2**32 - 1)
    headers = {
        "empty slices": nothing * (room // len(nothing)),
        "slices of all tokens there can be": huge.SerializeToString(),
        "many tokens, no bytes": many.SerializeToString(),
        "a row wider than memory": wide.SerializeToString(),
    }
    return {name: piece_of(header) for name, header in headers.items()}


def piece_of(header: bytes) -> bytes:
    """A last piece with the header's bytes as they are."""
    length = b"".join(bytes([len(header) >> shift & 127 | 128]) for shift in (0, 7, 14)) + bytes([len(header) >> 21])
    return bytes([0x1A]) + length + header + node_pb2.BatchPiece(last=True).SerializeToString()


@pytest.mark.parametrize("name", large_headers())
def test_a_message_that_declares_too_much_is_refused_before_memory_is_taken_for_it(name: str) -> None:
    data = large_headers()[name]
    assert len(data) <= channel.MAX_MESSAGE_BYTES
    node_pb2.BatchPiece.FromString(data)  # it is a message, so far
    assert decode([data]) == 0
    assert peak_bytes([data]) < channel.MAX_MESSAGE_BYTES
