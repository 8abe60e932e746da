"""Channels to nodes and ports of nodes: encrypted, kept alive, and closed to callers who have no business there."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

import grpc

from mdi.core.errors import ConfigError
from mdi.rpc.tls import Identity, host_name, node_names

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
MISSED_BEATS = 3  # in a row: the node is lost
MAX_MESSAGE_BYTES = 4 * 2**20
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
)
KEEPALIVE_OPTIONS = (  # a silent peer breaks the stream: gRPC asks every second and waits for two more
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS = (  # who asks so often is no attacker
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)
PATIENT_OPTIONS = (  # for a link whose buffers hold seconds of data: a ping waits behind them
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
ChannelOptions = Sequence[tuple[str, int | str]]


def open_channel(address: str, peer: str, identity: Identity | None, options: ChannelOptions) -> grpc.aio.Channel:
    """A channel to the node `peer`, and to no other; not encrypted without an identity."""
    if identity is None:
        return grpc.aio.insecure_channel(address, options=options)
    pinned = (*options, ("grpc.ssl_target_name_override", host_name(peer)))
    return grpc.aio.secure_channel(address, channel_credentials(identity), options=pinned)


def add_port(server: grpc.aio.Server, address: str, identity: Identity | None) -> int:
    """Binds a server and gives the port; not encrypted without an identity. Raises RuntimeError when it is taken."""
    if identity is None:
        return int(server.add_insecure_port(address))
    return int(server.add_secure_port(address, server_credentials(identity)))


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """For a client that shows its certificate, and takes servers of its authority."""
    return grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """For a server that takes only clients with a certificate of its authority."""
    return grpc.ssl_server_credentials(
        [(identity.key, identity.certificate)], identity.authority, require_client_auth=True
    )


def peer_name(context: grpc.aio.ServicerContext) -> str | None:
    """The node that calls, by its certificate; None without one, or with one that names no node or several."""
    values = context.auth_context().get("x509_subject_alternative_name", ())
    names = node_names([value.decode(errors="replace") for value in values])
    return names[0] if len(names) == 1 else None


class CallerCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses, and logs, calls by nodes that have no business with a method.

    callers: by the method's full name, the beginnings of the names of nodes that may call it.
    """

    def __init__(self, callers: Mapping[str, tuple[str, ...]]) -> None:
        self._callers = callers

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """See `grpc.aio.ServerInterceptor`. Handlers must be coroutines, or generators where they answer with many."""
        handler = await continuation(details)
        if handler is None:
            return None
        method = details.method
        if handler.response_streaming:
            return handler._replace(unary_stream=self._checked_stream(method, handler.unary_stream))
        if handler.request_streaming:
            return handler._replace(stream_unary=self._checked(method, handler.stream_unary))
        return handler._replace(unary_unary=self._checked(method, handler.unary_unary))

    def _checked(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await self._check(method, context)
            return await behaviour(request, context)

        return call

    def _checked_stream(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await self._check(method, context)
            async for message in behaviour(request, context):
                yield message

        return call

    async def _check(self, method: str, context: grpc.aio.ServicerContext) -> None:
        name = peer_name(context)
        if name is None or not name.startswith(self._callers.get(method, ())):
            who = f"node {name}" if name else "a peer whose certificate names no node"
            log.warning("refused %s at %s: it may not call %s", who, context.peer(), method)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{who} may not call this")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is of this machine alone. Raises ConfigError when it is not known."""
    try:
        return all(ip_address(info[4][0]).is_loopback for info in socket.getaddrinfo(host.strip("[]"), None))
    except (OSError, ValueError):
        raise ConfigError(f"the host {host!r} is not known here") from None
