"""Bytes are counted at both ends of a link, as serialised, and only those of batches, results and media."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from mdi.rpc import node_pb2
from mdi.rpc.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server
from mdi.rpc.traffic import Traffic, TrafficInterceptor, node_stub

BATCH = node_pb2.BatchPiece(epoch=1, batch_id=7, data=bytes(1000))
RESULT = node_pb2.BatchResult(epoch=1, batch_id=7, token_ids=[1, 2, 3], logprobs=[0.5, 0.25, 0.125])
ROWS = node_pb2.EncodePiece(manifest_digest="abc", data=bytes(500))
EMBEDDINGS = node_pb2.EmbeddingsPiece(data=bytes(300))


class Node(NodeServicer):
    """Takes everything, and answers with the messages above."""

    async def Status(self, _request: object, _context: object) -> node_pb2.NodeStatus:  # noqa: N802
        return node_pb2.NodeStatus(node="finisher")

    async def Batches(  # noqa: N802
        self, pieces: AsyncIterator[object], _context: object
    ) -> AsyncIterator[node_pb2.BatchesReply]:
        yield node_pb2.BatchesReply()
        assert [piece async for piece in pieces] == [BATCH, BATCH]

    async def Results(self, _request: object, _context: object) -> AsyncIterator[node_pb2.BatchResult]:  # noqa: N802
        yield RESULT

    async def Encode(  # noqa: N802
        self, pieces: AsyncIterator[object], _context: object
    ) -> AsyncIterator[node_pb2.EmbeddingsPiece]:
        assert [piece async for piece in pieces] == [ROWS]
        yield EMBEDDINGS
        yield EMBEDDINGS

    async def Weights(self, pieces: AsyncIterator[object], _context: object) -> node_pb2.WeightsReply:  # noqa: N802
        assert [piece async for piece in pieces]
        return node_pb2.WeightsReply()


async def calls(here: Traffic | None, there: Traffic) -> None:
    server = grpc.aio.server(interceptors=[TrafficInterceptor(there)])
    add_NodeServicer_to_server(Node(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = node_stub(channel, here)
        assert (await stub.Status(node_pb2.StatusRequest())).node == "finisher"
        assert [reply async for reply in stub.Batches(iter([BATCH, BATCH]))] == [node_pb2.BatchesReply()]
        assert [result async for result in stub.Results(node_pb2.ResultsRequest(epoch=1))] == [RESULT]
        assert [piece async for piece in stub.Encode(iter([ROWS]))] == [EMBEDDINGS, EMBEDDINGS]
        await stub.Weights(iter([node_pb2.WeightsPiece(data=bytes(700))]))
    await server.stop(None)


@pytest.mark.parametrize("counted_here", [True, False])
def test_both_ends_count_what_carries_activations(counted_here: bool) -> None:
    here, there = Traffic(), Traffic()
    asyncio.run(calls(here if counted_here else None, there))
    to_node, from_node = 2 * BATCH.ByteSize() + ROWS.ByteSize(), RESULT.ByteSize() + 2 * EMBEDDINGS.ByteSize()
    assert there == Traffic(sent_bytes=from_node, received_bytes=to_node)
    assert here == (Traffic(sent_bytes=to_node, received_bytes=from_node) if counted_here else Traffic())
