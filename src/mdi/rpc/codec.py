"""Batches, token masks, results and spans as protobuf messages, and back. Inconsistent messages are a LinkError.

The messages are in node.proto; `make proto` regenerates node_pb2.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import TypeVar, cast

import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from mdi.core.batch import (
    MASK_ELSEWHERE,
    Batch,
    CacheEdit,
    Copy,
    Deepstack,
    LogitAdjustment,
    Release,
    Result,
    Slice,
    Token,
    TokenSampling,
)
from mdi.core.dtypes import dtype_name
from mdi.core.errors import LinkError
from mdi.core.group import Rank
from mdi.core.tracing import Span, SpanName
from mdi.rpc import node_pb2
from mdi.rpc.group_join import Member

M = TypeVar("M", bound=Message)

PIECE_BYTES = 1_000_000
MAX_BATCH_BYTES = 256 * 2**20
OTHER_VERSION = "bytes arrived that are no message of this version of mdi: use one version everywhere"


def received(message: M | None) -> M:
    """What a node answered. Raises LinkError for bytes that are no such message: gRPC gives None for them."""
    if message is None:
        raise LinkError(OTHER_VERSION)
    return message


async def parsed(messages: AsyncIterator[M]) -> AsyncIterator[M]:
    """The messages of a stream that a node receives. Raises LinkError for bytes that are no such message."""
    try:
        async for message in messages:
            yield message
    except DecodeError:
        raise LinkError(OTHER_VERSION) from None


def encode_batch(batch: Batch, hidden: Tensor, epoch: int) -> Iterator[node_pb2.BatchPiece]:
    """A batch and its hidden states, [tokens, width], in pieces below 1 MiB. The features of its media follow them."""
    header, sent = encode_header(batch, hidden), tensors(batch, hidden)
    size_bytes = left = sum(tensor.nbytes for tensor in sent)
    for data in chain.from_iterable(map(pieces, sent)):
        first, left = left == size_bytes, left - len(data)
        yield node_pb2.BatchPiece(
            epoch=epoch, batch_id=batch.id, header=header if first else None, data=data, last=left == 0
        )


def encode_header(batch: Batch, hidden: Tensor) -> node_pb2.BatchHeader:
    """All of a batch but its `tensors`."""
    return node_pb2.BatchHeader(
        slices=[_encode_slice(part) for part in batch.slices],
        positions=batch.positions.flatten().tolist(),
        dtype=dtype_name(hidden.dtype),
        width=hidden.shape[1],
        edits=map(_encode_edit, batch.edits),
        deepstack=_encode_deepstack(batch.deepstack) if batch.deepstack else None,
    )


def tensors(batch: Batch, hidden: Tensor) -> tuple[Tensor, ...]:
    """What follows the header, as raw bytes."""
    return (hidden, batch.deepstack.features) if batch.deepstack else (hidden,)


def checked_bytes(header: node_pb2.BatchHeader, width: int, dtype: torch.dtype) -> int:
    """The size of the tensors that follow. Raises LinkError for a header that is not in order.

    Does not decode the slices yet: a header can announce many without any data.
    """
    n_tokens, odd = divmod(len(header.positions), 3)
    if odd or not 0 < len(header.slices) <= n_tokens:
        raise LinkError("a batch's slices and positions do not add up")
    if sum(part.length for part in header.slices) != n_tokens or not all(part.length for part in header.slices):
        raise LinkError("a batch's slices and positions do not add up")
    if any(len(part.samplings) > part.length for part in header.slices):
        raise LinkError("a slice draws more tokens than it has")
    if header.HasField("deepstack") and not (header.deepstack.rows and header.deepstack.n_layers):
        raise LinkError("features of media have no rows or no layers")
    if header.dtype != dtype_name(dtype) or header.width != width:
        raise LinkError(
            f"hidden states arrived as {header.dtype} x {header.width}, not as {dtype_name(dtype)} x {width}"
        )
    rows = n_tokens + len(header.deepstack.rows) * header.deepstack.n_layers
    if (size_bytes := rows * width * dtype.itemsize) > MAX_BATCH_BYTES:
        raise LinkError(f"a batch is larger than {MAX_BATCH_BYTES} bytes")
    return size_bytes


def decode_batch(batch_id: int, header: node_pb2.BatchHeader, numbers: Tensor) -> tuple[Batch, Tensor]:
    """A batch and its hidden states. numbers: those of its tensors, one after the other."""
    # few calls of torch, and no `torch.tensor`: each takes some 20 us when it is called once a step
    n_tokens = len(header.positions) // 3
    positions = torch.frombuffer(array("q", header.positions), dtype=torch.int64).view(3, n_tokens)
    rows, deepstack = numbers.view(-1, header.width), None
    if header.HasField("deepstack"):
        deepstack = _decode_deepstack(header.deepstack, rows[n_tokens:])
        rows = rows[:n_tokens]
    slices, edits = tuple(map(_decode_slice, header.slices)), tuple(map(_decode_edit, header.edits))
    return Batch(batch_id, slices, positions, edits, deepstack), rows


def encode_masks(batch: Batch, epoch: int) -> Iterator[node_pb2.BatchMasks]:
    """The token masks of a batch in messages below 1 MiB; no message when it has none."""
    message = node_pb2.BatchMasks(epoch=epoch, batch_id=batch.id)
    size_bytes = 0
    for mask in batch.token_masks:
        if message.masks and size_bytes + len(mask) > PIECE_BYTES:
            yield message
            message, size_bytes = node_pb2.BatchMasks(epoch=epoch, batch_id=batch.id), 0
        message.masks.append(mask)
        size_bytes += len(mask)
    if message.masks:
        yield message


def pieces(tensor: Tensor) -> Iterator[bytes]:
    """A tensor's bytes, row-major, in pieces below 1 MiB."""
    tensor = tensor.cpu().contiguous()
    begin, size_bytes = tensor.data_ptr(), tensor.nbytes
    for start in range(0, size_bytes, PIECE_BYTES):
        yield ctypes.string_at(begin + start, min(PIECE_BYTES, size_bytes - start))


class BatchDecoder:
    """Joins the pieces of batches. Raises LinkError for pieces that do not fit together.

    Uses memory for the bytes that arrived, not for those that a header announces.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._width = width
        self._dtype = dtype
        self._header: node_pb2.BatchHeader | None = None
        self._batch_id = 0
        self._size_bytes = 0
        self._data = bytearray()

    def add(self, piece: node_pb2.BatchPiece) -> tuple[Batch, Tensor] | None:
        """Adds a piece. Returns a batch and its hidden states when this was its last piece."""
        if piece.HasField("header"):
            if self._header is not None:
                raise LinkError("a batch began before the one before it had ended")
            self._size_bytes = checked_bytes(piece.header, self._width, self._dtype)
            self._header, self._batch_id = piece.header, piece.batch_id
        if self._header is None or piece.batch_id != self._batch_id:
            raise LinkError("a piece arrived that belongs to no batch")
        self._data += piece.data
        missing = self._size_bytes - len(self._data)
        if missing < 0 or (piece.last and missing):
            n_tokens = len(self._header.positions) // 3
            raise LinkError(f"{len(self._data)} bytes of hidden states arrived for {n_tokens} tokens")
        if not piece.last:
            return None
        header, data = self._header, self._data
        self._header, self._data = None, bytearray()
        return decode_batch(self._batch_id, header, torch.frombuffer(data, dtype=self._dtype))


def decode_group(messages: Sequence[node_pb2.GroupMember], n_shards: int) -> tuple[list[Member], list[Rank]]:
    """The ranks of a group in order: where they listen, and which of n_shards they have."""
    found = [
        (Member(one.node, one.host, one.port), Rank(one.first_shard, one.last_shard, n_shards)) for one in messages
    ]
    return [member for member, _ in found], [rank for _, rank in found]


def encode_result(result: Result, epoch: int) -> node_pb2.BatchResult:
    return node_pb2.BatchResult(
        epoch=epoch,
        batch_id=result.batch_id,
        token_ids=[token.id for token in result.tokens],
        logprobs=[token.logprob for token in result.tokens],
        top_logprobs=map(_encode_top_logprobs, result.tokens)
        if any(token.top_logprobs for token in result.tokens)
        else (),
        overflowed=result.overflowed,
    )


def decode_result(message: node_pb2.BatchResult) -> Result | LinkError:
    """The result, or the error that a node reported in its place."""
    if message.HasField("failure"):
        name = message.failure.node
        return LinkError(f"node {name} failed: {message.failure.message}", name)
    top_logprobs = [tuple(zip(top.token_ids, top.logprobs, strict=False)) for top in message.top_logprobs]
    n_tokens = len(message.token_ids)
    if len(message.logprobs) != n_tokens or len(top_logprobs) not in (0, n_tokens):
        return LinkError("a result's tokens and logprobs do not add up")
    tokens = tuple(map(Token, message.token_ids, message.logprobs, top_logprobs or [()] * n_tokens))
    return Result(message.batch_id, tokens, tuple(message.overflowed))


def encode_spans(spans: Iterable[Span], now_s: float) -> node_pb2.SpansReply:
    messages = [
        node_pb2.Span(
            work=span.name, start_s=span.start_s, end_s=span.end_s, batch_id=span.batch_id, n_tokens=span.n_tokens
        )
        for span in spans
    ]
    return node_pb2.SpansReply(now_s=now_s, spans=messages)


def decode_spans(message: node_pb2.SpansReply, asked_s: float, answered_s: float) -> list[Span]:
    """Spans by this machine's clock. asked_s, answered_s: when the call began and ended, by that clock.

    A node whose clock shows a time in between has the same clock. Any other is taken to have answered in the middle.
    """
    shift_s = 0.0 if asked_s <= message.now_s <= answered_s else (asked_s + answered_s) / 2 - message.now_s
    return [
        Span(cast(SpanName, span.work), span.start_s + shift_s, span.end_s + shift_s, span.batch_id, span.n_tokens)
        for span in message.spans
    ]


def _encode_deepstack(deepstack: Deepstack) -> node_pb2.Deepstack:
    return node_pb2.Deepstack(
        rows=deepstack.rows.tolist(), first_layer=deepstack.first_layer, n_layers=len(deepstack.features)
    )


def _decode_deepstack(message: node_pb2.Deepstack, features: Tensor) -> Deepstack:
    """features: [layers x rows, width]."""
    rows = torch.tensor(message.rows, dtype=torch.int64)
    return Deepstack(rows, features.view(message.n_layers, len(rows), -1), message.first_layer)


def _encode_edit(edit: CacheEdit) -> node_pb2.CacheEdit:
    if isinstance(edit, Copy):
        return node_pb2.CacheEdit(copy=node_pb2.Copy(source=edit.source, target=edit.target, length=edit.length))
    return node_pb2.CacheEdit(release=node_pb2.SlotRelease(slot=edit.slot, kept=edit.kept))


def _decode_edit(message: node_pb2.CacheEdit) -> CacheEdit:
    if message.HasField("copy"):
        return Copy(message.copy.source, message.copy.target, message.copy.length)
    return Release(message.release.slot, message.release.kept)


def _encode_slice(part: Slice) -> node_pb2.Slice:
    samplings = map(_encode_sampling, part.samplings)
    return node_pb2.Slice(slot=part.slot, start=part.start, length=part.length, samplings=samplings)


def _encode_sampling(sampling: TokenSampling) -> node_pb2.TokenSampling:
    return node_pb2.TokenSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=(sampling.seed + 2**63) % 2**64 - 2**63,
        sample=sampling.sample,
        position=sampling.position,
        top_logprobs=sampling.top_logprobs,
        adjustment=node_pb2.LogitAdjustment(**asdict(sampling.adjustment)) if sampling.adjustment else None,
        masked=sampling.token_mask is not None,
    )


def _decode_slice(message: node_pb2.Slice) -> Slice:
    return Slice(message.slot, message.start, message.length, tuple(map(_decode_sampling, message.samplings)))


def _decode_sampling(message: node_pb2.TokenSampling) -> TokenSampling:
    return TokenSampling(
        message.temperature,
        message.top_k,
        message.top_p,
        message.min_p,
        message.seed,
        message.sample,
        message.position,
        message.top_logprobs,
        _decode_adjustment(message.adjustment) if message.HasField("adjustment") else None,
        MASK_ELSEWHERE if message.masked else None,
    )


def _decode_adjustment(message: node_pb2.LogitAdjustment) -> LogitAdjustment:
    n_bytes, n_counts = len(message.counted_ids), len(message.counts)
    if n_bytes != n_counts or n_bytes % 4 or len(message.biased_ids) != len(message.biases):
        raise LinkError("a token's penalties and biases do not add up")
    return LogitAdjustment(
        message.repetition_penalty,
        message.presence_penalty,
        message.frequency_penalty,
        message.penalised,
        message.counted_ids,
        message.counts,
        tuple(message.biased_ids),
        tuple(message.biases),
    )


def _encode_top_logprobs(token: Token) -> node_pb2.TopLogprobs:
    return node_pb2.TopLogprobs(
        token_ids=[token_id for token_id, _ in token.top_logprobs],
        logprobs=[value for _, value in token.top_logprobs],
    )
