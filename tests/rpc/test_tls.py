"""The files of a node's identity: what is accepted, and what is said about the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mdi.core.errors import ConfigError
from mdi.rpc import authority as certs
from mdi.rpc.authority import Authority, create_authority, create_node
from mdi.rpc.tls import PRIVATE, Identity, encryption_enabled, write_whole


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


def test_an_expired_certificate_is_refused_with_the_day(
    folder: Path, outdated: Callable[[Authority, str], Identity]
) -> None:
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


def test_a_file_is_written_whole_whatever_a_killed_process_left(tmp_path: Path) -> None:
    for name, mode in (("key", PRIVATE), ("certificate", 0o644)):
        (tmp_path / f".{name}.new").write_bytes(b"half")
        for data in (b"first", b"second"):
            write_whole(tmp_path / name, data, mode)
            assert (tmp_path / name).read_bytes() == data
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certificate", "key"]


def test_an_identity_goes_through_a_pipe(folder: Path) -> None:
    identity = Identity.load(folder, "finisher")
    reading, writing = os.pipe()
    identity.send(writing)
    assert Identity.receive(reading) == identity
    reading, writing = os.pipe()
    os.write(writing, b'{"name": "finisher", "key": 1}')
    os.close(writing)
    with pytest.raises(ConfigError, match="no identity can be read"):
        Identity.receive(reading)
