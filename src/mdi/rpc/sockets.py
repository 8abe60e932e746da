"""TLS sockets of the standard library, beside gRPC: contexts of an identity, and the names in a certificate."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from cryptography import x509

from mdi.rpc.tls import Identity, dns_names, node_names


def client_context(identity: Identity) -> ssl.SSLContext:
    """For a client that shows its certificate, and accepts servers of its authority: compare their `peer_names`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the caller compares the names, to report whose certificate it is
    return _with_identity(context, identity)


def server_context(identity: Identity) -> ssl.SSLContext:
    """For a server that accepts only clients with a certificate of its authority: compare their `peer_names`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # no connection is resumed
    return _with_identity(context, identity)


def peer_names(encrypted: ssl.SSLSocket) -> list[str]:
    """The nodes that the certificate of the other side is of: one, if it is in order."""
    certificate = encrypted.getpeercert(binary_form=True)
    return node_names(dns_names(x509.load_der_x509_certificate(certificate))) if certificate else []


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of host:port, without the brackets of an IPv6 address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _with_identity(context: ssl.SSLContext, identity: Identity) -> ssl.SSLContext:
    context.load_verify_locations(cadata=identity.authority.decode())
    with _readable(identity.certificate) as certificate, _readable(identity.key) as key:
        context.load_cert_chain(certificate, key)
    return context


@contextmanager
def _readable(data: bytes) -> Iterator[str]:
    """A path to read data from, of a file without a name: the ssl module reads certificates from files only."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield f"/dev/fd/{file.fileno()}"
