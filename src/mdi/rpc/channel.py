"""Channels to nodes and ports of nodes: encrypted, kept alive."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from ipaddress import ip_address
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from mdi.core.errors import ConfigError, LinkError
from mdi.rpc import codec
from mdi.rpc.tls import Identity, host_name

HEARTBEAT_S = 1.0
MISSED_BEATS = 3  # in a row: the node is lost
SILENCE_S = 4  # on a stream that has a message every second: after a heartbeat would notice
CONNECT_S = 20  # until its first one
END: Any = object()
MAX_MESSAGE_BYTES = 4 * 2**20
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
)
KEEPALIVE_OPTIONS = (  # breaks a connection that carries nothing; `spoken` and heartbeats notice a silent node sooner
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 30_000),  # the kernel's limit, too, for a link that takes no more bytes for a while
    ("grpc.keepalive_permit_without_calls", 1),
    # what arrives counts as an answer to a ping; the ping itself may wait behind 64 KiB of data on a slow link
    ("grpc.http2.ping_timeout_ms", 60_000),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS = (  # allows the pings of KEEPALIVE_OPTIONS
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)
DIRECT_OPTIONS = (  # whatever http_proxy and GRPC_ADDRESS_HTTP_PROXY are in the environment
    ("grpc.enable_http_proxy", 0),
    ("grpc.address_http_proxy_enabled_addresses", ""),
)
ChannelOptions = Sequence[tuple[str, int | str]]
M = TypeVar("M", bound=Message)


def open_channel(address: str, peer: str, identity: Identity | None, options: ChannelOptions) -> grpc.aio.Channel:
    """Opens a channel to the node `peer`, and to no other node, never through a proxy.

    Not encrypted without an identity.
    """
    options = (*options, *DIRECT_OPTIONS)
    if identity is None:
        return grpc.aio.insecure_channel(address, options=options)
    pinned = (*options, ("grpc.ssl_target_name_override", host_name(peer)))
    return grpc.aio.secure_channel(address, channel_credentials(identity), options=pinned)


async def spoken(messages: AsyncIterable[M | None]) -> AsyncIterator[M]:
    """The messages of a stream on which a node sends one every second. Raises LinkError when it is silent.

    So a node proves that it is there while much is sent to it: a question would wait behind the data. Seconds are
    counted one by one, so a process that was frozen does not take its own absence for the node's.
    """
    arriving, limit_s = aiter(messages), CONNECT_S
    while True:
        message = asyncio.ensure_future(anext(arriving, END))
        try:
            for _ in range(limit_s):
                if (await asyncio.wait([message], timeout=1.0))[0]:
                    break
            else:
                raise LinkError(f"it was silent for {limit_s} s")
        finally:
            message.cancel()
        if (arrived := message.result()) is END:
            return
        yield codec.received(arrived)
        limit_s = SILENCE_S


def add_port(server: grpc.aio.Server, address: str, identity: Identity | None) -> int:
    """Binds a server and returns the port. Not encrypted without an identity. Raises RuntimeError for a taken port."""
    if identity is None:
        return int(server.add_insecure_port(address))
    return int(server.add_secure_port(address, server_credentials(identity)))


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Credentials of a client that shows its certificate, and accepts servers of its authority."""
    return grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """Credentials of a server that accepts only clients with a certificate of its authority."""
    return grpc.ssl_server_credentials(
        [(identity.key, identity.certificate)], identity.authority, require_client_auth=True
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address belongs to loopback. Raises ConfigError for an unknown host."""
    try:
        return all(ip_address(info[4][0]).is_loopback for info in socket.getaddrinfo(host.strip("[]"), None))
    except (OSError, ValueError):
        raise ConfigError(f"the host {host!r} is not known here") from None
