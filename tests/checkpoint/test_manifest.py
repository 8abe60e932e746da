"""A manifest that was changed or damaged is refused; what nodes compare is the content of the chunks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdi.checkpoint.manifest import FILE_NAME, Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import Source
from mdi.core.errors import CheckpointError


def edit_manifest(folder: Path, **entries: object) -> None:
    content = json.loads((folder / FILE_NAME).read_text())
    (folder / FILE_NAME).write_text(json.dumps({**content, **entries}))


@pytest.mark.parametrize(
    "entries",
    [
        {"colour": "red"},
        {"version": 1},
        {"dtype": "float16"},
        {"chunks": []},
        {"left_out": [0]},
        {"left_out": [2]},
        {"left_out": [3, 1]},
    ],
)
def test_a_manifest_that_was_changed_is_refused(entries: dict[str, object], source: Source) -> None:
    folder = prepare(source, 2)
    edit_manifest(folder, **entries)
    with pytest.raises(CheckpointError, match="damaged or of another version: run `mdi prepare` again"):
        Manifest.read(folder)


def test_a_manifest_whose_chunks_lose_a_layer_is_refused(source: Source) -> None:
    folder = prepare(source, 2)
    chunks = json.loads((folder / FILE_NAME).read_text())["chunks"]
    chunks[0]["last_layer"] -= 1
    edit_manifest(folder, chunks=chunks)
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.read(folder)


@pytest.mark.parametrize("rank", [None, {"first_shard": 1, "last_shard": 2, "n_shards": 3}, {"first_shard": 0}, 5])
def test_a_manifest_whose_ranks_lose_a_shard_is_refused(rank: object, source: Source) -> None:
    folder = prepare(source, 2, groups=(2,))
    chunks = json.loads((folder / FILE_NAME).read_text())["chunks"]
    chunks[1]["rank"] = rank
    edit_manifest(folder, chunks=chunks)
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.read(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_manifest_that_is_no_json_object_is_refused(content: bytes, source: Source) -> None:
    folder = prepare(source, 2)
    (folder / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.read(folder)


def test_the_digest_is_that_of_plan_dtype_and_chunks_whenever_the_files_were_written(source: Source) -> None:
    manifest = Manifest.read(prepare(source, 2))
    later = tuple(file.model_copy(update={"mtime_ns": 1}) for file in manifest.source)
    assert manifest.model_copy(update={"source": later}).digest == manifest.digest
    assert manifest.model_copy(update={"dtype": "float16"}).digest != manifest.digest
    chunks = (manifest.chunks[0].model_copy(update={"sha256": "0"}), *manifest.chunks[1:])
    assert manifest.model_copy(update={"chunks": chunks}).digest != manifest.digest
