"""Where sent chunks are kept: what is there counts, what cannot be right goes, and a disk that refuses says so."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from mdi.checkpoint.cache import CachedChunk, ChunkCache, default_cache_folder
from mdi.checkpoint.loader import load_chunk
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import Source
from mdi.core.errors import CheckpointError, ConfigError

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def chunks(source: Source) -> Path:
    return prepare(source, 2)


@pytest.fixture
def chunk(chunks: Path, tmp_path: Path) -> CachedChunk:
    return ChunkCache(tmp_path / "cache").chunk(Manifest.read(chunks), "finisher")


def test_a_chunk_grows_in_parts_and_loads_when_it_is_whole(chunk: CachedChunk, chunks: Path) -> None:
    data = (chunks / chunk.entry.file).read_bytes()
    for start in range(0, len(data), 50_000):
        chunk.prepare()
        assert (chunk.have_bytes, chunk.complete) == (start, False)
        with chunk.growing() as file:
            file.write(data[start : start + 50_000])
    chunk.finish()
    assert chunk.complete
    assert load_chunk(chunk.path).spec == chunk.entry.spec
    chunk.discard()
    assert (chunk.have_bytes, chunk.complete) == (0, False)


def test_what_cannot_be_right_is_removed(chunk: CachedChunk) -> None:
    chunk.prepare()
    with chunk.growing() as file:
        file.write(bytes(chunk.entry.size_bytes + 1))
    chunk.path.write_bytes(b"short")
    chunk.prepare()
    assert chunk.have_bytes == 0
    assert not chunk.path.exists()


def test_two_processes_do_not_write_one_chunk(chunk: CachedChunk) -> None:
    chunk.prepare()
    with (
        chunk.growing(),
        pytest.raises(CheckpointError, match=r"another process is receiving.*--cache-folder"),
        chunk.growing(),
    ):
        pass


def test_a_full_disk_is_named_before_anything_is_sent(chunk: CachedChunk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, chunk.entry.size_bytes))
    with pytest.raises(CheckpointError, match=r"disk of .* is full .*GB are free.*make room.*--cache-folder"):
        chunk.prepare()


def test_a_role_that_is_not_in_the_manifest_has_no_chunk(chunk: CachedChunk, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not in its folder's manifest"):
        ChunkCache(tmp_path).chunk(chunk.manifest, "../finisher")


def test_a_folder_that_cannot_be_used_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made.*--cache-folder"):
        ChunkCache(tmp_path / "file" / "chunks").check()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"nothing can be written into .*--cache-folder"):
        ChunkCache(tmp_path).check()


def test_chunks_are_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "mdi" / "chunks"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "mdi" / "chunks"
