"""Byte counts of what a link carries: batches, results, patch rows and embeddings, as serialised."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from mdi.rpc.node_pb2_grpc import NodeStub

COUNTED = frozenset({"Batches", "Results", "Encode"})  # of these methods, what is streamed
Serializer = Callable[[Message], bytes]
Parser = Callable[[bytes], Message]


@dataclass
class Traffic:
    """Bytes sent and received so far. For any thread."""

    sent_bytes: int = 0
    received_bytes: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count_sent(self, n_bytes: int) -> None:
        with self._counting:
            self.sent_bytes += n_bytes

    def count_received(self, n_bytes: int) -> None:
        with self._counting:
            self.received_bytes += n_bytes

    def counting_serializer(self, serialize: Serializer) -> Serializer:
        """The same serializer; what it makes counts as sent."""

        def counted(message: Message) -> bytes:
            data = serialize(message)
            self.count_sent(len(data))
            return data

        return counted

    def counting_parser(self, parse: Parser) -> Parser:
        """The same parser; what it parses counts as received."""

        def counted(data: bytes) -> Message:
            self.count_received(len(data))
            return parse(data)

        return counted


def node_stub(channel: grpc.aio.Channel, traffic: Traffic | None = None) -> NodeStub:
    """The service's methods over a channel. traffic: counts the bytes of those that carry activations.

    A reply that is no message of the service arrives as None: pass it through `codec.received`.
    """
    return NodeStub(_CountedChannel(channel, traffic) if traffic else channel)


class _CountedChannel:
    """A channel as `NodeStub` needs it."""

    def __init__(self, channel: grpc.aio.Channel, traffic: Traffic) -> None:
        self._channel = channel
        self._traffic = traffic

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        """kind: unary_unary, unary_stream, stream_unary or stream_stream."""
        make = getattr(self._channel, kind)

        def multicallable(
            method: str, request_serializer: Serializer, response_deserializer: Parser, **options: Any
        ) -> Any:
            if _counts(method) and kind.startswith("stream"):
                request_serializer = self._traffic.counting_serializer(request_serializer)
            if _counts(method) and kind.endswith("stream"):
                response_deserializer = self._traffic.counting_parser(response_deserializer)
            return make(
                method,
                request_serializer=request_serializer,
                response_deserializer=response_deserializer,
                **options,
            )

        return multicallable


class TrafficInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Counts the bytes of a server's calls that carry activations."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(details)
        if handler and _counts(details.method) and handler.request_streaming:
            parse = self._traffic.counting_parser(handler.request_deserializer)
            handler = handler._replace(request_deserializer=parse)
        if handler and _counts(details.method) and handler.response_streaming:
            serialize = self._traffic.counting_serializer(handler.response_serializer)
            handler = handler._replace(response_serializer=serialize)
        return handler


def _counts(method: str) -> bool:
    return method.rpartition("/")[2] in COUNTED
