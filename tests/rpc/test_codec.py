"""Messages between nodes: what goes in comes out, and what is broken is a LinkError, never a crash."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdi.core.batch import (
    MASK_ELSEWHERE,
    Batch,
    Copy,
    Deepstack,
    LogitAdjustment,
    Release,
    Result,
    Slice,
    Token,
    TokenSampling,
)
from mdi.core.errors import LinkError
from mdi.engine.sequence import SeenTokens
from mdi.rpc import codec, node_pb2

SOURCE = Path(codec.__file__).parents[2]
WIDTH = 8
PLAIN = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)

samplings = st.builds(
    TokenSampling,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
    sample=st.integers(0, 63),
    position=st.integers(0, 2**31 - 1),
)
slices = st.builds(
    Slice,
    slot=st.integers(0, 999),
    start=st.integers(0, 2**20),
    length=st.integers(1, 40),
    samplings=st.just(()) | st.tuples(samplings),
)


def batch_of(*parts: Slice, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> tuple[Batch, Tensor]:
    n_tokens = sum(part.length for part in parts)
    positions = torch.randint(0, 10**6, (3, n_tokens))
    return Batch(7, parts, positions), torch.randn(n_tokens, width).to(dtype)


def through(batch: Batch, hidden: Tensor) -> tuple[Batch, Tensor]:
    """Encodes, serialises, parses and decodes."""
    decoder = codec.BatchDecoder(hidden.shape[1], hidden.dtype)
    decoded = None
    for piece in codec.encode_batch(batch, hidden, epoch=3):
        data = piece.SerializeToString()
        assert len(data) < 2**20 + 4096
        assert decoded is None
        decoded = decoder.add(node_pb2.BatchPiece.FromString(data))
    assert decoded is not None
    return decoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=30, deadline=None)
@given(parts=st.lists(slices, min_size=1, max_size=6))
def test_a_batch_survives_the_wire(dtype: torch.dtype, parts: list[Slice]) -> None:
    batch, hidden = batch_of(*parts, dtype=dtype)
    got, got_hidden = through(batch, hidden)
    assert (got.id, got.slices) == (batch.id, batch.slices)
    assert torch.equal(got.positions, batch.positions)
    assert got_hidden.dtype == dtype
    assert torch.equal(got_hidden, hidden)


def test_edits_of_the_cache_survive_the_wire_in_their_order() -> None:
    batch, hidden = batch_of(Slice(0, 0, 2))
    edits = (Release(3, 0), Copy(1, 2, 30_000), Release(1, 64), Copy(2, 0, 1))
    assert through(replace(batch, edits=edits), hidden)[0].edits == edits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_media_survive_the_wire(dtype: torch.dtype) -> None:
    batch, hidden = batch_of(Slice(0, 0, 300), Slice(1, 4, 2), dtype=dtype, width=512)
    deepstack = Deepstack(torch.arange(3, 290), torch.randn(2, 287, 512).to(dtype), first_layer=5)
    got, got_hidden = through(replace(batch, deepstack=deepstack), hidden)
    assert got.deepstack
    assert torch.equal(got_hidden, hidden)
    assert torch.equal(got.deepstack.rows, deepstack.rows)
    assert torch.equal(got.deepstack.features, deepstack.features)
    assert got.deepstack.first_layer == 5


def test_a_batch_without_media_is_as_large_as_ever() -> None:
    batch, hidden = batch_of(Slice(0, 0, 1))
    deepstack = Deepstack(torch.tensor([0]), torch.ones(1, 1, WIDTH), first_layer=2)
    plain = [piece.SerializeToString() for piece in codec.encode_batch(batch, hidden, epoch=3)]
    done = replace(batch, deepstack=deepstack).beyond(3)
    assert done.deepstack is None
    assert [piece.SerializeToString() for piece in codec.encode_batch(done, hidden, epoch=3)] == plain


@pytest.mark.parametrize(("rows", "n_layers"), [([], 1), ([0], 0), ([0, 1], 2), ([0], 2**31)])
def test_announced_features_must_arrive(rows: list[int], n_layers: int) -> None:
    batch, hidden = batch_of(Slice(0, 0, 2))
    deepstack = Deepstack(torch.tensor([0]), torch.ones(1, 1, WIDTH), first_layer=2)
    first, last = codec.encode_batch(replace(batch, deepstack=deepstack), hidden, epoch=3)
    first.header.deepstack.CopyFrom(node_pb2.Deepstack(rows=rows, first_layer=2, n_layers=n_layers))
    decoder = codec.BatchDecoder(WIDTH, torch.float32)
    with pytest.raises(LinkError, match=r"no rows or no layers|bytes of hidden states|larger than"):
        assert decoder.add(first) or decoder.add(last)


def test_penalties_of_a_long_prompt_travel_in_a_small_message() -> None:
    """16 sequences of 32,000 tokens: messages of 4 MiB are the limit."""
    seen = SeenTokens(range(0, 150_000, 5))
    for token in range(0, 150_000, 50):
        seen.add(token)
    adjustment = LogitAdjustment(
        1.1, 0, 0, bytes(seen.bits), seen.ids.tobytes(), seen.counts.tobytes(), (5, 7), (0.5, -math.inf)
    )
    sampling = TokenSampling(1.0, 0, 1.0, 0.0, 3, 0, 9, adjustment=adjustment)
    batch, hidden = batch_of(*[Slice(slot, 31_999, 1, (sampling,)) for slot in range(16)])
    assert through(batch, hidden)[0].slices == batch.slices


def test_a_large_batch_travels_in_pieces_below_a_mebibyte() -> None:
    batch, hidden = batch_of(Slice(0, 0, 512), dtype=torch.bfloat16, width=3584)
    assert len(list(codec.encode_batch(batch, hidden, epoch=0))) == 4
    assert torch.equal(through(batch, hidden)[1], hidden)


def test_a_result_survives_the_wire() -> None:
    result = Result(9, (Token(151_935, -0.25), Token(0, -17.5)))
    message = node_pb2.BatchResult.FromString(codec.encode_result(result, epoch=2).SerializeToString())
    assert codec.decode_result(message) == result


@given(sizes=st.lists(st.none() | st.integers(1, 600_000), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_masks_travel_apart_from_their_batch_in_messages_below_a_mebibyte(sizes: list[int | None]) -> None:
    masks = [None if size is None else bytes([index]) * size for index, size in enumerate(sizes)]
    parts = [Slice(0, 0, 1, (replace(PLAIN, token_mask=mask),)) for mask in masks]
    batch, hidden = batch_of(*parts)
    travelled, _ = through(batch, hidden)
    assert sum(len(piece.SerializeToString()) for piece in codec.encode_batch(batch, hidden, epoch=3)) < 1000
    assert [sampling.token_mask for sampling in travelled.samplings] == [mask and MASK_ELSEWHERE for mask in masks]
    messages = list(codec.encode_masks(batch, epoch=3))
    assert all(message.ByteSize() < 2**20 for message in messages)
    assert {(message.epoch, message.batch_id) for message in messages} <= {(3, batch.id)}
    arrived = [mask for message in messages for mask in message.masks]
    assert travelled.with_token_masks(arrived).slices == batch.slices


def test_a_failure_names_its_node() -> None:
    failure = node_pb2.Failure(node="secondary0", message="out of memory")
    error = codec.decode_result(node_pb2.BatchResult(failure=failure))
    assert isinstance(error, LinkError)
    assert str(error) == "node secondary0 failed: out of memory"


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10**6), change=st.integers(1, 255), cut=st.integers(0, 40))
def test_damaged_bytes_are_refused_or_harmless(position: int, change: int, cut: int) -> None:
    batch, hidden = batch_of(Slice(1, 2, 3), Slice(4, 5, 6, (TokenSampling(1.0, 0, 1.0, 0.0, 1, 2, 3),)))
    [piece] = codec.encode_batch(batch, hidden, epoch=1)
    data = bytearray(piece.SerializeToString())
    data[position % len(data)] ^= change
    try:
        decoded = codec.BatchDecoder(WIDTH, torch.float32).add(
            node_pb2.BatchPiece.FromString(bytes(data[: len(data) - cut]))
        )
    except (LinkError, DecodeError):
        return
    if decoded is not None:
        assert decoded[1].shape == (decoded[0].n_tokens, WIDTH)
        assert decoded[0].positions.shape == (3, decoded[0].n_tokens)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused_or_harmless(data: bytes) -> None:
    try:
        codec.BatchDecoder(WIDTH, torch.float32).add(node_pb2.BatchPiece.FromString(data))
        codec.decode_result(node_pb2.BatchResult.FromString(data))
    except (LinkError, DecodeError):
        pass


def test_bytes_of_another_version_are_named_at_both_ends() -> None:
    async def damaged() -> AsyncIterator[node_pb2.BatchPiece]:
        yield node_pb2.BatchPiece(batch_id=1)
        yield node_pb2.BatchPiece.FromString(b"\xff\xff")

    async def read() -> None:
        async for piece in codec.parsed(damaged()):
            assert piece.batch_id == 1

    with pytest.raises(LinkError, match="use one version everywhere"):
        asyncio.run(read())
    with pytest.raises(LinkError, match="use one version everywhere"):
        codec.received(None)  # what gRPC makes of such a reply


def broken(change: str) -> node_pb2.BatchPiece:
    batch, hidden = batch_of(Slice(0, 0, 4))
    [piece] = codec.encode_batch(batch, hidden, epoch=1)
    match change:
        case "positions":
            del piece.header.positions[-1]
        case "length":
            piece.header.slices[0].length = 2**31
        case "no tokens":
            piece.header.slices[0].length = 0
        case "dtype":
            piece.header.dtype = "bfloat16"
        case "width":
            piece.header.width = 2**30
        case "data":
            piece.data = piece.data[:-1]
        case "header":
            piece.ClearField("header")
    return piece


@pytest.mark.parametrize("change", ["positions", "length", "no tokens", "dtype", "width", "data", "header"])
def test_what_does_not_add_up_is_refused(change: str) -> None:
    with pytest.raises(LinkError):
        codec.BatchDecoder(WIDTH, torch.float32).add(broken(change))


def test_a_batch_that_brings_more_than_it_declared_is_refused_at_once() -> None:
    decoder = codec.BatchDecoder(WIDTH, torch.float32)
    piece = broken("nothing")
    piece.last = False
    decoder.add(piece)
    piece.ClearField("header")
    with pytest.raises(LinkError, match="256 bytes of hidden states arrived for 4 tokens"):
        decoder.add(piece)


def test_a_batch_that_declares_too_much_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_BATCH_BYTES", 100)
    with pytest.raises(LinkError, match="larger than 100 bytes"):
        codec.BatchDecoder(WIDTH, torch.float32).add(broken("nothing"))


def test_the_generated_code_is_of_the_proto_file(tmp_path: Path) -> None:
    outputs = [f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{SOURCE}", *outputs, "mdi/rpc/node.proto"]
    subprocess.run(command, check=True, cwd=SOURCE)

    def generated(folder: Path, marker: str, file: str) -> list[str]:
        """Lines that do not depend on the version of the generator."""
        return [line for line in (folder / "mdi/rpc" / file).read_text().splitlines() if marker in line]

    for marker, file in (("AddSerializedFile", "node_pb2.py"), ("mdi_dot_rpc_dot_node__pb2.", "node_pb2_grpc.py")):
        made, kept = (generated(folder, marker, file) for folder in (tmp_path, SOURCE))
        assert made
        assert made == kept, "run `make proto`"
