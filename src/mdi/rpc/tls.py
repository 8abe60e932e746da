"""Who a node is on the network, and the encrypted ports and channels it makes from that. Makes no certificates.

Every certificate carries the DNS name NAME.mdi.internal of its node. Peers check that name and not the address: a node
may move, and none can pass for another. Both sides of a link show a certificate (mutual TLS).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mdi.core.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "ENABLE_ENCRYPTION"
DOMAIN = ".mdi.internal"
AUTHORITY_FILE = "ca.pem"
NODE_NAME = re.compile(r"starter|finisher|vision|(secondary|spare)\d{1,4}")
WARN_BEFORE = timedelta(days=14)
ChannelOptions = Sequence[tuple[str, int | str]]


def encryption_enabled() -> bool:
    """Whether ENABLE_ENCRYPTION asks for encrypted links. Raises ConfigError for a value that is neither yes nor no."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value in ("", "0"):
        return False
    if value in ("1", "true", "yes"):
        return True
    raise ConfigError(f"{VARIABLE} must be 1 or 0, got {value!r}")


@dataclass(frozen=True)
class Identity:
    """A node's name, and in PEM: its certificate, its private key, and the certificate of its authority."""

    name: str
    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes

    @classmethod
    def load(cls, folder: Path, name: str) -> Identity:
        """From `ca.pem`, `NAME.pem` and `NAME.key` in a folder.

        Raises ConfigError, with the remedy, for files that are missing or damaged, not of one authority, of another
        node, or expired.
        """
        files = (f"{name}.pem", f"{name}.key", AUTHORITY_FILE)
        certificate, key, authority = (_read(folder / file, name) for file in files)
        _warn_if_exposed(folder / f"{name}.key")
        identity = cls(name, certificate, key, authority)
        _check(identity, folder)
        return identity

    def save(self, folder: Path) -> None:
        """Writes the three files that `load` reads; the key readable by its owner alone."""
        write_private(folder / f"{self.name}.key", self.key)
        (folder / f"{self.name}.pem").write_bytes(self.certificate)
        (folder / AUTHORITY_FILE).write_bytes(self.authority)


def host_name(node: str) -> str:
    """The DNS name that stands for a node in its certificate."""
    return node + DOMAIN


def node_names(dns_names: Sequence[str]) -> list[str]:
    """The nodes that a certificate's DNS names stand for."""
    return [name.removesuffix(DOMAIN) for name in dns_names if name.endswith(DOMAIN)]


def write_private(path: Path, data: bytes) -> None:
    """Writes a file that only its owner can read, all of it or nothing; replaces what is there."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    half.replace(path)


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


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"there is no {str(path)!r}: run `mdi certs node {name}` where the authority's key is, "
            f"and copy {AUTHORITY_FILE}, {name}.pem and {name}.key into {str(path.parent)!r} here"
        ) from None
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error.strerror})") from None


def _warn_if_exposed(key: Path) -> None:
    if key.stat().st_mode & 0o077:
        log.warning("other users can read the private key %s: chmod 600 it", key)


def _check(identity: Identity, folder: Path) -> None:
    """Raises ConfigError unless peers can be expected to take this identity."""
    name, certificate, key, authority = identity.name, *_parse(identity, folder)
    renew = f"make a new one with `mdi certs node {name} --force`, and copy {name}.pem and {name}.key here"
    shown = f"the certificate {folder / name}.pem"
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"{shown} does not belong to {name}.key: copy both from where they were made")
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(
            f"{shown} is not of the authority in {AUTHORITY_FILE}: "
            f"copy {AUTHORITY_FILE} from where it was made, or {renew}"
        ) from None
    found = node_names(dns_names(certificate))
    if found != [name]:
        raise ConfigError(f"{shown} is of {' and '.join(found) or 'no node'}, not of {name}: {renew}")
    _check_dates(shown, certificate, renew)
    _check_dates(f"the authority {folder / AUTHORITY_FILE}", authority, "make a new one with `mdi certs init --force`")


def _parse(identity: Identity, folder: Path) -> tuple[x509.Certificate, PrivateKeyTypes, x509.Certificate]:
    file = f"{identity.name}.pem"
    try:
        certificate = x509.load_pem_x509_certificate(identity.certificate)
        file = f"{identity.name}.key"
        key = load_pem_private_key(identity.key, None)
        file = AUTHORITY_FILE
        return certificate, key, x509.load_pem_x509_certificate(identity.authority)
    except (ValueError, TypeError):
        raise ConfigError(f"{str(folder / file)!r} is damaged: copy it again from where it was made") from None


def dns_names(certificate: x509.Certificate) -> list[str]:
    """The DNS names in a certificate."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return names.get_values_for_type(x509.DNSName)


def _check_dates(shown: str, certificate: x509.Certificate, renew: str) -> None:
    now, ends = datetime.now(UTC), certificate.not_valid_after_utc
    if now < certificate.not_valid_before_utc:
        raise ConfigError(
            f"{shown} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, "
            f"and here it is {now:%Y-%m-%d %H:%M}: set this machine's clock"
        )
    if now >= ends:
        raise ConfigError(f"{shown} expired on {ends:%Y-%m-%d %H:%M} UTC: {renew}")
    if ends - now < WARN_BEFORE:
        log.warning("%s expires on %s UTC: %s", shown, f"{ends:%Y-%m-%d %H:%M}", renew)
