"""Files, data: URLs and bytes, and every way they are refused."""

from __future__ import annotations

import base64
import os
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from mdi.core.errors import MediaError
from mdi.media import MediaPolicy, fetch

BODY = bytes(range(256)) * 40


# Files


@pytest.fixture
def media_dir(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    (root / "deep").mkdir(parents=True)
    (root / "cat.bin").write_bytes(BODY)
    (root / "deep" / "a b.bin").write_bytes(BODY)
    (tmp_path / "secret.bin").write_bytes(b"secret")
    (root / "escape").symlink_to(tmp_path / "secret.bin")
    (root / "inner").symlink_to(root / "cat.bin")
    (root / "loop").symlink_to(root / "loop")
    return root


def test_bytes_come_back_as_they_are() -> None:
    assert fetch(BODY, MediaPolicy()) == BODY


@pytest.mark.parametrize("name", ["cat.bin", "deep/a b.bin", "deep/../cat.bin", "inner"])
def test_a_file_inside_the_media_directory_is_read(media_dir: Path, name: str) -> None:
    policy = MediaPolicy(media_dir=media_dir)
    assert fetch(name, policy) == BODY
    assert fetch(str(media_dir / name), policy) == BODY
    assert fetch(media_dir / name, policy) == BODY
    assert fetch("file://" + quote(str(media_dir / name)), policy) == BODY


def test_a_media_directory_that_is_itself_a_symlink_works(media_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(media_dir)
    assert fetch("cat.bin", MediaPolicy(media_dir=tmp_path / "alias")) == BODY


@pytest.mark.parametrize(
    "name", ["../secret.bin", "escape", "/etc/hostname", "../nothing-here", "deep/../../secret.bin"]
)
def test_a_file_outside_the_media_directory_is_refused_whether_it_exists_or_not(media_dir: Path, name: str) -> None:
    with pytest.raises(MediaError, match="outside the media directory") as caught:
        fetch(name, MediaPolicy(media_dir=media_dir))
    assert str(media_dir.parent) not in str(caught.value)
    with pytest.raises(MediaError, match="outside the media directory"):
        fetch("file://" + str(media_dir / name), MediaPolicy(media_dir=media_dir))


def test_without_a_media_directory_no_file_is_read(media_dir: Path) -> None:
    with pytest.raises(MediaError, match="not served here"):
        fetch(media_dir / "cat.bin", MediaPolicy())


def test_any_file_reads_what_the_process_can_read(media_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(media_dir)
    policy = MediaPolicy(any_file=True)
    assert fetch("cat.bin", policy) == BODY
    assert fetch("../secret.bin", policy) == b"secret"
    assert fetch("escape", policy) == b"secret"


def test_an_unusable_file_is_refused_with_its_cause(media_dir: Path) -> None:
    os.mkfifo(media_dir / "pipe")
    (media_dir / "empty").touch()
    causes = {
        "missing.png": "there is no file 'missing.png'",
        "cat.bin/x": "there is no file",
        "deep": "is not a file",
        "pipe": "is not a file",
        "loop": "cannot be read",
        "nul\0": "cannot be read",
        "x" * 5000: "cannot be read",
        "empty": "empty",
        "": "is not a file",
    }
    for name, cause in causes.items():
        with pytest.raises(MediaError, match=cause) as caught:
            fetch(name, MediaPolicy(media_dir=media_dir))
        assert caught.value.field == "image"
        assert str(media_dir) not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_a_file_above_the_byte_limit_is_refused(media_dir: Path) -> None:
    policy = MediaPolicy(media_dir=media_dir, max_bytes=len(BODY) - 1)
    for source in ("cat.bin", BODY):
        with pytest.raises(MediaError, match="larger than the limit"):
            fetch(source, policy)
    assert fetch("cat.bin", replace(policy, max_bytes=len(BODY))) == BODY


def test_a_file_url_of_another_machine_is_refused(media_dir: Path) -> None:
    with pytest.raises(MediaError, match="on this machine"):
        fetch("file://elsewhere/cat.bin", MediaPolicy(media_dir=media_dir))


@pytest.mark.parametrize("source", ["ftp://host/cat.png", "s3://bucket/cat.png", "gopher://x", "JAR://x"])
def test_an_unknown_scheme_is_refused_by_name(source: str) -> None:
    with pytest.raises(MediaError, match=source.split(":")[0].lower()):
        fetch(source, MediaPolicy(any_file=True))


# data: URLs


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(BODY).decode(),
        "DATA:;BASE64," + base64.b64encode(BODY).decode(),
        "data:image/png;name=x;base64," + base64.encodebytes(BODY).decode(),
        "data:image/png;base64," + base64.b64encode(BODY).decode().rstrip("="),
        "data:image/png;base64," + quote(base64.b64encode(BODY).decode(), safe=""),
        "data:application/octet-stream," + quote(BODY, safe=""),
    ],
)
def test_a_data_url_is_decoded(url: str) -> None:
    assert fetch(url, MediaPolicy()) == BODY


@pytest.mark.parametrize("piece", [1, 3, 4, 7, 76, 77, 1000])
def test_a_data_url_is_decoded_piece_by_piece(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["mdi.media.fetch"], "BASE64_PIECE", piece)
    body = bytes(range(256)) * 3
    for end in range(250, 260):
        for text in (base64.b64encode(body[:end]).decode(), base64.encodebytes(body[:end]).decode()):
            assert fetch(f"data:;base64,{text}", MediaPolicy()) == body[:end]
    for text in ("aGk=aGk=", "aGkaa", "aG?k"):
        with pytest.raises(MediaError, match="valid base64"):
            fetch(f"data:;base64,{text}", MediaPolicy())


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("data:image/png;base64,????", "valid base64"),
        ("data:image/png;base64,iVBOR", "valid base64"),
        ("data:image/png;base64,aGk=aGk=", "valid base64"),
        ("data:image/png;base64,é", "valid base64"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,", "empty"),
        ("data:,", "empty"),
    ],
)
def test_a_broken_data_url_is_refused_with_its_cause(url: str, cause: str) -> None:
    with pytest.raises(MediaError, match=cause):
        fetch(url, MediaPolicy())


def test_a_data_url_above_the_byte_limit_is_refused() -> None:
    url = "data:;base64," + base64.b64encode(BODY).decode()
    assert fetch(url, MediaPolicy(max_bytes=len(BODY))) == BODY
    for limit in (len(BODY) - 1, 100):
        with pytest.raises(MediaError, match="larger than the limit"):
            fetch(url, MediaPolicy(max_bytes=limit))
    with pytest.raises(MediaError, match="larger than the limit"):
        fetch("data:," + "a" * 101, MediaPolicy(max_bytes=100))
