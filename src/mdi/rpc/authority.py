"""The authority of a cluster, and the certificates that it issues to nodes. P-256 keys, X.509 as in RFC 5280."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mdi.core.errors import ConfigError
from mdi.rpc.node_key import NodeKey, private_pem
from mdi.rpc.tls import AUTHORITY_FILE, DOMAIN, NODE_NAME, PRIVATE, Identity, host_name, write_whole

HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})?)*\.?")
AUTHORITY_KEY_FILE = "ca.key"
AUTHORITY_DAYS = 3650
NODE_DAYS = 90
MAX_DAYS = 36500
CLOCK_SLACK = timedelta(hours=1)  # a clock may be behind by this much


@dataclass(frozen=True)
class Authority:
    """A private key that signs the certificates of nodes, and the authority's own certificate."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, days: int = AUTHORITY_DAYS) -> Authority:
        """Makes a new authority. Raises ConfigError for days out of range."""
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        name = _name(f"MDI-LLM authority {serial % 16**8:08x}")  # programs confuse authorities of one name
        usage = _usage(key_cert_sign=True, crl_sign=True)
        builder = (
            _builder(name, name, key.public_key(), _ends(days))
            .serial_number(serial)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Reads an authority from a folder. Raises ConfigError when there is none that can be used."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / AUTHORITY_FILE).read_bytes())
            key = load_pem_private_key((folder / AUTHORITY_KEY_FILE).read_bytes(), None)
        except FileNotFoundError:
            raise ConfigError(
                f"there is no authority in {str(folder)!r}: run `mdi certs init` first, once for all nodes, "
                "and make all certificates there"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"the authority in {str(folder)!r} cannot be read ({error})") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{AUTHORITY_FILE} and {AUTHORITY_KEY_FILE} in {str(folder)!r} do not belong together")
        return cls(certificate, key)

    def save(self, folder: Path) -> None:
        """Writes `ca.pem` and `ca.key`. Only its owner can read the key."""
        write_whole(folder / AUTHORITY_KEY_FILE, private_pem(self.key), PRIVATE)
        write_whole(folder / AUTHORITY_FILE, self.pem)

    def issue(self, node: str, addresses: Sequence[str] = (), days: int = NODE_DAYS) -> Identity:
        """Makes a new key and a certificate for a node, which is server and client.

        addresses: host names and IP addresses that the certificate also lists, for other tools; nodes check the name.
        The certificate does not outlive the authority. Raises ConfigError for a name that no node can have, or for an
        address that is none.
        """
        key = NodeKey.create()
        return key.identity(node, self._certify(node, key.public, addresses, days), self.pem)

    def sign(self, node: str, request: bytes, days: int = NODE_DAYS) -> bytes:
        """The certificate, as PEM, for a key that the node made itself: see `NodeKey.request`.

        The caller says which node it is; names in the request do not count. Raises ConfigError for a request that is
        none, or is not signed with its own key.
        """
        try:
            asked = x509.load_pem_x509_csr(request)
            key = asked.public_key() if asked.is_signature_valid else None
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ConfigError(f"what {node} sent is no request for a certificate of an elliptic curve's key")
        return self._certify(node, key, (), days)

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    def _certify(self, node: str, key: ec.EllipticCurvePublicKey, addresses: Sequence[str], days: int) -> bytes:
        if not NODE_NAME.fullmatch(node):
            raise ConfigError(
                f"there is no node {node!r}: nodes are starter, secondary0, secondary1, ..., finisher, vision, spare0"
            )
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        ends = min(_ends(days), self.certificate.not_valid_after_utc)
        names = [x509.DNSName(host_name(node)), *map(_alternative, addresses)]
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            _builder(_name(node), self.certificate.subject, key, ends)
            .serial_number(x509.random_serial_number())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(issuer, critical=False)
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def create_authority(folder: Path, *, days: int = AUTHORITY_DAYS, force: bool = False) -> Authority:
    """Makes an authority and writes it into a folder. Raises ConfigError when there is one already, without `force`."""
    authority = Authority.create(days)
    _make_folder(folder)
    _keep(folder, [AUTHORITY_FILE, AUTHORITY_KEY_FILE], force, "all certificates it made would be refused")
    _write(authority, folder)
    return authority


def create_node(
    folder: Path, name: str, addresses: Sequence[str] = (), *, days: int = NODE_DAYS, force: bool = False
) -> Identity:
    """Makes a node's certificate with the authority of a folder, and writes it there.

    Raises ConfigError when the node has one already, without `force`.
    """
    identity = Authority.load(folder).issue(name, addresses, days)
    _keep(folder, [f"{name}.pem", f"{name}.key"], force, "the node goes on with its old one until it gets the new one")
    _write(identity, folder)
    return identity


def expiry(identity: Identity) -> datetime:
    """When a certificate expires, in UTC."""
    return x509.load_pem_x509_certificate(identity.certificate).not_valid_after_utc


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {str(folder)!r} cannot be made ({error.strerror})") from None


def _write(made: Authority | Identity, folder: Path) -> None:
    try:
        made.save(folder)
    except OSError as error:
        raise ConfigError(f"nothing can be written into {str(folder)!r} ({error.strerror})") from None


def _keep(folder: Path, files: Sequence[str], force: bool, warning: str) -> None:
    there = [file for file in files if (folder / file).exists()]
    if there and not force:
        raise ConfigError(f"{str(folder / there[0])!r} is there already; --force replaces it, and {warning}")


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .not_valid_before(datetime.now(UTC) - CLOCK_SLACK)
        .not_valid_after(ends)
    )


def _ends(days: int) -> datetime:
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"a certificate is valid for 1 to {MAX_DAYS} days, not {days}")
    return datetime.now(UTC) + timedelta(days=days)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(address))
    except ValueError:
        pass
    if not HOST_NAME.fullmatch(address) or address.lower().rstrip(".").endswith(DOMAIN):
        raise ConfigError(f"{address!r} is no host's name or IP address") from None
    return x509.DNSName(address)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
