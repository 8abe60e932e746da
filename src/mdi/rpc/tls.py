"""The identity of a node: its certificate and private key, as read from a folder and checked. Makes no certificates.

Every certificate has the DNS name NAME.mdi.internal of its node. Peers check that name and not the address: a node may
move to another machine, and no other node can take its place. Both sides of a link show a certificate (mutual TLS).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

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
PRIVATE = 0o600  # mode of a file that only its owner can read
WARN_BEFORE = timedelta(days=14)


def encryption_enabled() -> bool:
    """Whether ENABLE_ENCRYPTION switches encryption on. Raises ConfigError for a value that is neither yes nor no."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value in ("", "0"):
        return False
    if value in ("1", "true", "yes"):
        return True
    raise ConfigError(f"{VARIABLE} must be 1 or 0, got {value!r}")


@dataclass(frozen=True)
class Identity:
    """A node's name and, as PEM, its certificate, its private key and the certificate of its authority."""

    name: str
    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes

    @classmethod
    def load(cls, folder: Path, name: str) -> Identity:
        """Reads `ca.pem`, `NAME.pem` and `NAME.key` in a folder.

        Raises ConfigError, with the remedy, when a file is missing, damaged, expired, of another node or of another
        authority.
        """
        files = (f"{name}.pem", f"{name}.key", AUTHORITY_FILE)
        certificate, key, authority = (_read(folder / file, name) for file in files)
        _warn_if_exposed(folder / f"{name}.key")
        identity = cls(name, certificate, key, authority)
        _check(identity, folder)
        return identity

    @classmethod
    def of_one(cls, folder: Path, names: Sequence[str]) -> Identity:
        """The first of these nodes that has a certificate in a folder. Raises ConfigError as `load` does."""
        there = [name for name in names if (folder / f"{name}.pem").exists()]
        return cls.load(folder, (there or names)[0])

    def save(self, folder: Path) -> None:
        """Writes the three files that `load` reads. Only their owner can read the key."""
        write_whole(folder / f"{self.name}.key", self.key, PRIVATE)
        write_whole(folder / f"{self.name}.pem", self.certificate)
        write_whole(folder / AUTHORITY_FILE, self.authority)

    def send(self, descriptor: int) -> None:
        """Writes all of it into a pipe, for `receive`."""
        parts = {"certificate": self.certificate, "key": self.key, "authority": self.authority}
        with os.fdopen(descriptor, "w") as pipe:
            json.dump({"name": self.name, **{name: data.decode() for name, data in parts.items()}}, pipe)

    @classmethod
    def receive(cls, descriptor: int) -> Identity:
        """Reads what `send` wrote, and closes the pipe. Raises ConfigError for anything else."""
        try:
            with os.fdopen(descriptor) as pipe:
                given = json.load(pipe)
            return cls(given["name"], *(given[part].encode() for part in ("certificate", "key", "authority")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"no identity can be read from the open file {descriptor}") from None


def host_name(node: str) -> str:
    """The DNS name of a node in its certificate."""
    return node + DOMAIN


def node_names(dns_names: Sequence[str]) -> list[str]:
    """The nodes that a certificate's DNS names belong to."""
    return [name.removesuffix(DOMAIN) for name in dns_names if name.endswith(DOMAIN)]


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes a file, all of it or nothing, also when the power fails. Replaces a file of that name."""
    half = path.with_name(f".{path.name}.new")
    half.unlink(missing_ok=True)  # of a process that was killed, perhaps with another mode
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


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
    """Raises ConfigError for an identity that peers would refuse."""
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
