"""Where sent chunks are kept: what is there counts, what cannot be right goes, and a disk that refuses says so."""

from __future__ import annotations

import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
from testing.checkpoints import tiny_config

from mdi.checkpoint.cache import Cache
from mdi.checkpoint.loader import load_chunk
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.errors import CheckpointError
from mdi.node.store import ChunkStore, StoredChunk

Usage = namedtuple("Usage", ["total", "used", "free"])


def store(folder: Path, limit_bytes: int = 10**9) -> ChunkStore:
    return ChunkStore(Cache(folder, limit_bytes))


@pytest.fixture
def chunks(tmp_path: Path) -> Path:
    return prepare(open_source(write_random_checkpoint(tmp_path / "model", tiny_config())), 2)


@pytest.fixture
def chunk(chunks: Path, tmp_path: Path) -> StoredChunk:
    return store(tmp_path / "cache").chunk(Manifest.read(chunks), "finisher")


def test_a_chunk_grows_in_parts_and_loads_when_it_is_whole(chunk: StoredChunk, chunks: Path) -> None:
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


def test_what_cannot_be_right_is_removed(chunk: StoredChunk) -> None:
    chunk.prepare()
    with chunk.growing() as file:
        file.write(bytes(chunk.entry.size_bytes + 1))
    chunk.path.write_bytes(b"short")
    chunk.prepare()
    assert chunk.have_bytes == 0
    assert not chunk.path.exists()


def test_two_processes_do_not_write_one_chunk(chunk: StoredChunk) -> None:
    chunk.prepare()
    with (
        chunk.growing(),
        pytest.raises(CheckpointError, match=r"another process is receiving.*--cache-folder"),
        chunk.growing(),
    ):
        pass


def test_a_full_disk_is_named_before_anything_is_sent(chunk: StoredChunk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, chunk.entry.size_bytes))
    with pytest.raises(CheckpointError, match=r"disk of .* is full .*GB are free.*make room.*--cache-folder"):
        chunk.prepare()


def test_a_role_that_is_not_in_the_manifest_has_no_chunk(chunk: StoredChunk, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not in its folder's manifest"):
        store(tmp_path).chunk(chunk.manifest, "../finisher")


def test_only_the_entry_of_the_last_chunk_is_in_use(chunks: Path, tmp_path: Path) -> None:
    kept, manifest = store(tmp_path / "cache"), Manifest.read(chunks)
    other = manifest.model_copy(update={"model": "other"})
    for expected in (manifest, other):
        kept.chunk(expected, "finisher").prepare()
        assert [entry.name for entry in kept.cache.entries() if entry.in_use] == [expected.digest]


def test_a_chunk_that_arrives_displaces_the_least_recently_used(chunks: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(chunks)
    size_bytes = manifest.chunk("model_finisher.safetensors").size_bytes
    kept = store(tmp_path / "cache", limit_bytes=int(1.5 * size_bytes))
    for name, age_s in (("older", 200), ("newer", 100)):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "data").write_bytes(bytes(size_bytes // 3))
        os.utime(tmp_path / "cache" / name, (time.time() - age_s,) * 2)
    kept.chunk(manifest, "finisher").prepare()
    assert {entry.name for entry in kept.cache.entries()} == {"newer", manifest.digest}
