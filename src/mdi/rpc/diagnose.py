"""The diagnosis of a node that does not answer: the cause and the remedy, which gRPC does not report. Plain sockets.

For use after a failure: it opens connections. The private key is never in a file with a name.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable

from mdi.rpc.sockets import client_context, host_and_port, peer_names
from mdi.rpc.tls import VARIABLE, Identity

TIMEOUT_S = 1.0
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # preface, empty SETTINGS
SETTINGS = 4  # RFC 9113 section 6.5: the type of the frame that a server sends first

EXPIRED, NOT_YET_VALID = 10, 9  # X509_V_ERR_* of OpenSSL


def diagnose(address: str, peer: str, identity: Identity | None) -> str | None:
    """Why the node `peer` at host:port does not answer this node; None if it does. Takes a few seconds at most."""
    try:
        return _handshake(address, peer, identity)
    except socket.gaierror:
        return f"the host of {address} is not known here"
    except TimeoutError:
        return f"{address} does not answer: is the machine on, and the port open in its firewall?"
    except ConnectionRefusedError:
        return f"nothing listens at {address}: start the node there"
    except OSError as error:
        return f"{address} cannot be reached ({error.strerror or error})"


def _handshake(address: str, peer: str, identity: Identity | None) -> str | None:
    if identity is not None:
        return _encrypted_handshake(address, peer, identity)
    if _speaks_http2(address):
        return None
    if _speaks_tls(address):
        return f"{address} is encrypted and this side is not: set {VARIABLE}=1 here as well"
    return _no_node(address)


def _encrypted_handshake(address: str, peer: str, identity: Identity) -> str | None:
    try:
        with _connect_encrypted(address, _context(identity)) as encrypted:
            found = peer_names(encrypted)
            if found != [peer]:
                return f"{address} has the certificate of {' and '.join(found) or 'no node'}, not of {peer}"
            accepted = _answers_http2(encrypted)
    except ssl.SSLCertVerificationError as error:
        return _untrusted(address, peer, error)
    except (ssl.SSLError, ConnectionResetError):
        if _speaks_http2(address):
            return f"{address} is not encrypted and this side is: start the node there with {VARIABLE}=1"
        return _no_node(address)
    if accepted:
        return None
    return (
        f"{address} refuses the certificate of {identity.name}: do both clocks agree, "
        "and are both certificates of one authority? Its log has the reason"
    )


def _untrusted(address: str, peer: str, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code == EXPIRED:
        return f"the certificate at {address} has expired: make a new one there (`mdi certs node {peer} --force`)"
    if error.verify_code == NOT_YET_VALID:
        return f"the certificate at {address} is not valid yet: do both clocks agree?"
    return f"the certificate at {address} is of another authority: copy ca.pem and certificates from one `mdi certs`"


def _no_node(address: str) -> str:
    return f"what listens at {address} is no mdi node"


def _connect(address: str) -> socket.socket:
    return socket.create_connection(host_and_port(address), TIMEOUT_S)


def _connect_encrypted(address: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Wraps before it connects: the ssl module never closes a connection that is reset between the two."""
    failure = OSError("it has no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(*host_and_port(address), type=socket.SOCK_STREAM):
        encrypted = context.wrap_socket(socket.socket(family, kind, protocol))
        encrypted.settimeout(TIMEOUT_S)
        try:
            encrypted.connect(place)
            return encrypted
        except OSError as error:
            encrypted.close()
            if isinstance(error, ssl.SSLError):
                raise
            failure = error
    raise failure


def _context(identity: Identity) -> ssl.SSLContext:
    context = client_context(identity)
    context.set_alpn_protocols(["h2"])
    return context


def _speaks_http2(address: str) -> bool:
    with _connect(address) as connection:
        return _answers_http2(connection)


def _speaks_tls(address: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # any TLS server will do
    context.set_alpn_protocols(["h2"])
    try:
        with _connect_encrypted(address, context):
            return True
    except (ssl.SSLError, ConnectionResetError):
        return False


def _answers_http2(connection: socket.socket) -> bool:
    """Whether the other side answers as an HTTP/2 server. A TLS 1.3 server refuses a client only at this point."""
    try:
        connection.sendall(HTTP2_PREFACE)
        frame = _receive(connection.recv, 9)
    except (ssl.SSLError, ConnectionError):
        return False
    return len(frame) == 9 and frame[3] == SETTINGS


def _receive(recv: Callable[[int], bytes], n_bytes: int) -> bytes:
    data = b""
    while len(data) < n_bytes and (more := recv(n_bytes - len(data))):
        data += more
    return data
