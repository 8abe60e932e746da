"""Who gets through to a node and who does not: real servers on loopback, and what both sides are told."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from testing.links import call_node, fake_node, free_port, raw_server

from mdi.cluster.link import GrpcLink, NodeAddress, PipelineSettings
from mdi.core.errors import ConfigError, LinkError
from mdi.rpc import authority as certs
from mdi.rpc import channel, node_pb2
from mdi.rpc.authority import Authority, create_authority, create_node
from mdi.rpc.diagnose import why_unreachable
from mdi.rpc.tls import Identity, encryption_enabled


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture(scope="module")
def stranger() -> Authority:
    return Authority.create()


@pytest.fixture(scope="module")
def starter(authority: Authority) -> Identity:
    return authority.issue("starter")


@pytest.fixture(scope="module")
def finisher(authority: Authority) -> Identity:
    return authority.issue("finisher", ["127.0.0.1", "localhost", "::1"])


@pytest.fixture(scope="module")
def server(finisher: Identity) -> Iterator[str]:
    with fake_node(finisher) as address:
        yield address


def outdated(authority: Authority, node: str) -> Identity:
    """A certificate that ended a minute ago."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "_ends", lambda days: datetime.now(UTC) - timedelta(minutes=1))
        return authority.issue(node)


def refused(address: str, peer: str, identity: Identity | None) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        call_node(address, peer, identity)
    return error.value.code()


def test_nodes_of_one_authority_talk_and_know_who_the_other_is(server: str, starter: Identity) -> None:
    assert call_node(server, "finisher", starter) == [
        node_pb2.NodeStatus(name="finisher", error="starter", state=node_pb2.NodeStatus.LOADED)
    ]
    assert why_unreachable(server, "finisher", starter) is None


def test_nodes_in_the_clear_talk() -> None:
    with fake_node(None) as address:
        assert call_node(address, "finisher", None) == [
            node_pb2.NodeStatus(name="finisher", state=node_pb2.NodeStatus.LOADED)
        ]
        assert why_unreachable(address, "finisher", None) is None


def test_a_client_of_another_authority_is_refused(server: str, starter: Identity, stranger: Authority) -> None:
    intruder = replace(
        stranger.issue("starter"), authority=starter.authority
    )  # it has the right ca.pem: that is public
    assert refused(server, "finisher", intruder) is grpc.StatusCode.UNAVAILABLE
    reason = why_unreachable(server, "finisher", intruder)
    assert reason
    assert "refuses the certificate of starter" in reason


def test_a_client_with_an_expired_certificate_is_refused(server: str, authority: Authority) -> None:
    late = outdated(authority, "starter")
    assert refused(server, "finisher", late) is grpc.StatusCode.UNAVAILABLE
    reason = why_unreachable(server, "finisher", late)
    assert reason
    assert "refuses the certificate of starter: do both clocks agree" in reason


def test_a_client_without_a_certificate_is_refused(
    server: str, starter: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        channel, "channel_credentials", lambda identity: grpc.ssl_channel_credentials(identity.authority)
    )
    assert refused(server, "finisher", starter) is grpc.StatusCode.UNAVAILABLE


def test_a_server_of_another_authority_is_refused(stranger: Authority, starter: Identity) -> None:
    with fake_node(stranger.issue("finisher")) as address:
        assert refused(address, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
        reason = why_unreachable(address, "finisher", starter)
    assert reason
    assert "is of another authority: copy ca.pem" in reason


def test_a_server_with_an_expired_certificate_is_refused(authority: Authority, starter: Identity) -> None:
    with fake_node(outdated(authority, "finisher")) as address:
        assert refused(address, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
        reason = why_unreachable(address, "finisher", starter)
    assert reason
    assert "has expired: make a new one there (`mdi certs node finisher --force`)" in reason


def test_a_server_with_a_certificate_that_is_not_valid_yet_is_refused(
    authority: Authority, starter: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certs, "CLOCK_SLACK", timedelta(hours=-1))
    with fake_node(authority.issue("finisher")) as address:
        assert refused(address, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
        reason = why_unreachable(address, "finisher", starter)
    assert reason
    assert "not valid yet: do both clocks agree?" in reason


def test_another_nodes_certificate_is_refused_although_its_address_is_right(
    authority: Authority, starter: Identity
) -> None:
    with fake_node(authority.issue("secondary0", ["127.0.0.1", "localhost"])) as address:
        assert refused(address, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
        reason = why_unreachable(address, "finisher", starter)
    assert reason == f"{address} has the certificate of secondary0, not of finisher"


def test_plain_traffic_to_an_encrypted_port_is_told(server: str) -> None:
    assert refused(server, "finisher", None) is grpc.StatusCode.UNAVAILABLE
    reason = why_unreachable(server, "finisher", None)
    assert reason == f"{server} is encrypted and this side is not: set ENABLE_ENCRYPTION=1 here as well"


def test_encrypted_traffic_to_a_plain_port_is_told(starter: Identity) -> None:
    with fake_node(None) as address:
        assert refused(address, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
        reason = why_unreachable(address, "finisher", starter)
    assert reason == f"{address} is not encrypted and this side is: start the node there with ENABLE_ENCRYPTION=1"


def test_what_is_no_node_is_told(starter: Identity) -> None:
    def web(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    def hangs_up(connection: socket.socket) -> None:
        pass

    for answer in (web, hangs_up):
        with raw_server(answer) as address:
            for identity in (starter, None):
                assert why_unreachable(address, "finisher", identity) == f"what listens at {address} is no mdi node"


def test_a_port_that_never_answers_does_not_hold_the_caller(starter: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts nobody: as a frozen node does
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for identity in (starter, None):
            started = time.monotonic()
            reason = why_unreachable(address, "finisher", identity)
            assert reason
            assert "does not answer: is the machine on, and the port open in its firewall?" in reason
            assert time.monotonic() - started < 5


def test_a_port_where_nobody_listens_and_a_host_that_is_not_known_are_told(starter: Identity) -> None:
    port = free_port()
    for identity in (starter, None):
        reason = why_unreachable(f"127.0.0.1:{port}", "finisher", identity)
        assert reason == f"nothing listens at 127.0.0.1:{port}: start the node there"
        reason = why_unreachable("nowhere.invalid:5000", "finisher", identity)
        assert reason == "the host of nowhere.invalid:5000 is not known here"


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_link_tells_why_a_node_does_not_answer(server: str, starter: Identity, encrypted: bool) -> None:
    settings = PipelineSettings("", n_slots=1, sequence_length=8)
    words = r"secondary0 does not answer.*has the certificate of finisher" if encrypted else "set ENABLE_ENCRYPTION=1"
    with pytest.raises(LinkError, match=words):
        GrpcLink.connect(
            [NodeAddress("secondary0", server)], settings, lambda _: None, identity=starter if encrypted else None
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of an authority with a finisher's certificate."""
    path = tmp_path / "certs"
    create_authority(path)
    create_node(path, "finisher", ["10.0.0.3"])
    return path


def refusal(folder: Path, name: str = "finisher") -> str:
    with pytest.raises(ConfigError) as error:
        Identity.load(folder, name)
    return str(error.value)


def test_an_identity_is_loaded_from_its_folder(folder: Path) -> None:
    identity = Identity.load(folder, "finisher")
    assert identity.name == "finisher"
    assert "PRIVATE" not in repr(identity)
    copied = folder.parent / "copied"
    copied.mkdir()
    identity.save(copied)
    assert Identity.load(copied, "finisher") == identity


def test_missing_files_are_named_with_what_to_copy(folder: Path) -> None:
    assert "run `mdi certs node secondary0`" in refusal(folder, "secondary0")
    (folder / "ca.pem").unlink()
    assert "copy ca.pem, finisher.pem and finisher.key" in refusal(folder)


@pytest.mark.parametrize("file", ["finisher.pem", "finisher.key", "ca.pem"])
@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\xff"])
def test_damaged_files_are_named(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    assert f"{file}' is damaged" in refusal(folder)


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "finisher.key").unlink()
    (folder / "finisher.key").mkdir()
    assert "finisher.key' cannot be read" in refusal(folder)


def test_a_key_of_another_certificate_is_refused(folder: Path) -> None:
    create_node(folder, "secondary0")
    shutil.copy(folder / "secondary0.key", folder / "finisher.key")
    assert "does not belong to finisher.key" in refusal(folder)


def test_another_nodes_files_under_this_name_are_refused(folder: Path) -> None:
    create_node(folder, "secondary0")
    for suffix in ("key", "pem"):
        shutil.copy(folder / f"secondary0.{suffix}", folder / f"finisher.{suffix}")
    assert "is of secondary0, not of finisher" in refusal(folder)


def test_a_certificate_of_another_authority_is_refused(folder: Path) -> None:
    create_authority(folder, force=True)
    assert "is not of the authority in ca.pem" in refusal(folder)


def test_an_expired_certificate_is_refused_with_the_day(folder: Path) -> None:
    outdated(Authority.load(folder), "finisher").save(folder)
    today = datetime.now(UTC) - timedelta(minutes=1)
    assert f"expired on {today:%Y-%m-%d}" in refusal(folder)
    assert "mdi certs node finisher --force" in refusal(folder)


def test_the_certificate_of_an_expired_authority_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certs, "_ends", lambda days: datetime.now(UTC) + timedelta(days=30 if days == 90 else 0))
    create_authority(folder, days=1, force=True)
    create_node(folder, "finisher", force=True)
    assert "expired on" in refusal(folder)  # the node's ends with it


def test_a_certificate_of_tomorrow_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certs, "CLOCK_SLACK", timedelta(hours=-5))
    create_node(folder, "finisher", force=True)
    assert "set this machine's clock" in refusal(folder)


def test_the_end_of_a_certificate_is_announced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    create_node(folder, "finisher", days=13, force=True)
    Identity.load(folder, "finisher")
    assert "expires on" in caplog.text
    caplog.clear()
    create_node(folder, "finisher", days=30, force=True)
    Identity.load(folder, "finisher")
    assert caplog.text == ""


def test_a_key_that_others_can_read_is_pointed_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "finisher.key").chmod(0o644)
    Identity.load(folder, "finisher")
    assert "other users can read the private key" in caplog.text


@pytest.mark.parametrize(
    ("value", "wanted"), [("1", True), ("true", True), ("YES", True), ("0", False), ("", False), (None, False)]
)
def test_encryption_is_what_the_environment_says(
    value: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENABLE_ENCRYPTION", raising=False)
    if value is not None:
        monkeypatch.setenv("ENABLE_ENCRYPTION", value)
    assert encryption_enabled() is wanted


@pytest.mark.parametrize("value", ["2", "on", "false", "ja"])
def test_another_word_for_encryption_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_ENCRYPTION", value)
    with pytest.raises(ConfigError, match="ENABLE_ENCRYPTION must be 1 or 0"):
        encryption_enabled()
