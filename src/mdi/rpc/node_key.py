"""The private key of a node, made where it is used, and the request with which an authority certifies it."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from mdi.rpc.tls import Identity


@dataclass(frozen=True)
class NodeKey:
    """A P-256 key."""

    private: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls) -> NodeKey:
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @property
    def public(self) -> ec.EllipticCurvePublicKey:
        return self.private.public_key()

    def request(self) -> bytes:
        """A request for a certificate (PKCS #10, RFC 2986), as PEM. It names no node: the authority's owner does."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(self.private, hashes.SHA256()).public_bytes(Encoding.PEM)

    def identity(self, node: str, certificate: bytes, authority: bytes) -> Identity:
        """The node's identity with this key. certificate, authority: as PEM."""
        return Identity(node, certificate, private_pem(self.private), authority)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
