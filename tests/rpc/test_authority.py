"""The authority and what it makes: right contents, private files, nothing replaced by accident."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from mdi.core.errors import ConfigError
from mdi.rpc.authority import Authority, create_authority, create_node, expiry
from mdi.rpc.node_key import NodeKey, private_pem
from mdi.rpc.tls import Identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_authority(tmp_path / "certs")
    return tmp_path / "certs"


def test_a_nodes_certificate_says_what_it_should(folder: Path) -> None:
    identity = create_node(folder, "secondary0", ["10.0.0.2", "fe80::1", "jetson-2.local"])
    certificate = x509.load_pem_x509_certificate(identity.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["secondary0.mdi.internal", "jetson-2.local"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("10.0.0.2"), ip_address("fe80::1")]
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(purposes) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert abs(expiry(identity) - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=5)


def test_keys_are_for_their_owner_alone(folder: Path) -> None:
    create_node(folder, "finisher")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes.keys() == {"ca.pem", "ca.key", "finisher.pem", "finisher.key"}
    assert modes["ca.key"] == modes["finisher.key"] == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nothing_is_replaced_unless_forced(folder: Path) -> None:
    create_node(folder, "finisher")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"ca\.pem' is there already; --force"):
        create_authority(folder)
    with pytest.raises(ConfigError, match=r"finisher\.pem' is there already; --force"):
        create_node(folder, "finisher")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    create_node(folder, "finisher", force=True)
    create_authority(folder, force=True)
    assert all((folder / name).read_bytes() != content for name, content in before.items())


def test_no_certificate_outlives_its_authority(folder: Path) -> None:
    authority = create_authority(folder, days=10, force=True)
    assert expiry(authority.issue("starter", days=90)) == authority.certificate.not_valid_after_utc


def test_authorities_are_told_apart_by_name() -> None:
    first, second = Authority.create(), Authority.create()
    assert first.certificate.subject != second.certificate.subject


def test_the_folder_without_an_authority_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `mdi certs init` first"):
        create_node(tmp_path, "finisher")


def test_a_damaged_authority_is_named(folder: Path) -> None:
    other = Authority.create()
    other.save(folder.parent)
    (folder / "ca.key").write_bytes((folder.parent / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match="do not belong together"):
        create_node(folder, "finisher")
    (folder / "ca.key").write_bytes(b"?")
    with pytest.raises(ConfigError, match="cannot be read"):
        create_node(folder, "finisher")


def test_a_place_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        create_authority(folder / "file" / "certs")
    (folder / "finisher.pem").mkdir()
    with pytest.raises(ConfigError, match="nothing can be written"):
        create_node(folder, "finisher", force=True)


@pytest.mark.parametrize("name", ["", "Starter", "secondary", "secondary_0", "node1", "../finisher", "finisher\n"])
def test_a_name_that_no_node_has_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="there is no node"):
        create_node(folder, name)


@pytest.mark.parametrize("address", ["", "a b", "http://x", "10.0.0.1:80", "starter.mdi.internal", "*.lan", "ü.de"])
def test_an_address_that_is_none_is_refused(folder: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="no host's name or IP address"):
        create_node(folder, "finisher", [address])
    assert not (folder / "finisher.key").exists()


@pytest.mark.parametrize("days", [0, -1, 40_000])
def test_days_out_of_range_are_refused(folder: Path, days: int) -> None:
    with pytest.raises(ConfigError, match="1 to 36500 days"):
        create_node(folder, "finisher", days=days)
    with pytest.raises(ConfigError, match="1 to 36500 days"):
        Authority.create(days)


def test_what_is_made_can_be_loaded(folder: Path) -> None:
    made = create_node(folder, "starter", ["localhost"])
    assert Identity.load(folder, "starter") == made


def test_a_key_that_a_node_made_is_certified_and_stays_there(tmp_path: Path) -> None:
    authority, key = Authority.create(), NodeKey.create()
    request = key.request()
    assert private_pem(key.private) not in request
    assert b"PRIVATE" not in request
    certificate = authority.sign("finisher", request)
    key.identity("finisher", certificate, authority.pem).save(tmp_path)
    identity = Identity.load(tmp_path, "finisher")  # checks that all three belong together
    assert abs(expiry(identity) - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=5)


def test_a_request_that_was_changed_or_is_none_is_not_signed() -> None:
    authority = Authority.create()
    der = bytearray(x509.load_pem_x509_csr(NodeKey.create().request()).public_bytes(Encoding.DER))
    der[-1] ^= 1  # of the signature
    changed = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    rsa_key = rsa.generate_private_key(65537, 2048)
    other = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(rsa_key, hashes.SHA256())
    for request in (b"", b"no request", changed, other.public_bytes(Encoding.PEM)):
        with pytest.raises(ConfigError, match="what finisher sent is no request for a certificate"):
            authority.sign("finisher", request)
    with pytest.raises(ConfigError, match="there is no node 'ca'"):
        authority.sign("ca", NodeKey.create().request())
