"""GGUF files from strangers: whatever they say of themselves, they are read or refused, without much memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from testing.checkpoints import tiny_config, tiny_text_config
from testing.gguf_files import write_gguf, write_mmproj

from mdi.checkpoint.gguf import gguf_folder
from mdi.checkpoint.gguf_file import GgufFile
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.errors import CheckpointError

HEAD_BYTES = 14_000  # of the small files: entries and descriptions of tensors
MOST_BYTES = 64 * 2**20
LYING = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
CHANGES = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    checkpoint = write_random_checkpoint(folder / "llama", tiny_text_config("llama", num_hidden_layers=1))
    return write_gguf(checkpoint, folder / "small.gguf", "Q8_0")


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("vision")
    checkpoint = write_random_checkpoint(folder / "qwen2_vl", tiny_config(num_hidden_layers=1))
    return write_gguf(checkpoint, folder / "a.gguf", "Q4_0"), write_mmproj(checkpoint, folder / "b.gguf", "F16")


def read_or_refused(model: Path, mmproj: Path | None = None) -> bool:
    """Whether everything could be read; nothing else than CheckpointError comes out."""
    tracemalloc.start()
    try:
        source = open_source(gguf_folder(model, mmproj))
        for name in sorted(source.names()):
            source.tensor(name)
        _ = source.quantization
        return True
    except CheckpointError:
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MOST_BYTES


def changed(file: Path, content: bytes) -> Path:
    path = file.with_name("changed.gguf")
    path.write_bytes(content)
    return path


def test_the_files_themselves_are_read(text: Path, vision: tuple[Path, Path]) -> None:
    assert read_or_refused(text)
    assert read_or_refused(*vision)


@CHANGES
@given(st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=3), st.booleans())
def test_changed_bytes(text: Path, changes: list[tuple[float, bytes]], near: bool) -> None:
    """near: within the file's description of itself."""
    content = bytearray(text.read_bytes())
    for place, other in changes:
        start = int(place * ((HEAD_BYTES if near else len(content)) - len(other)))
        content[start : start + len(other)] = other
    read_or_refused(changed(text, bytes(content)))


@CHANGES
@given(place=st.integers(4, HEAD_BYTES), value=st.sampled_from(LYING), width=st.sampled_from(["<I", "<Q"]))
@example(place=8, value=2**62, width="<Q")  # tensors
@example(place=16, value=2**62, width="<Q")  # entries
def test_numbers_that_lie(text: Path, place: int, value: int, width: str) -> None:
    content = bytearray(text.read_bytes())
    struct.pack_into(width, content, place, value % 2 ** (8 * struct.calcsize(width)))
    read_or_refused(changed(text, bytes(content)))


@CHANGES
@given(place=st.integers(4, HEAD_BYTES // 4), value=st.sampled_from(LYING), other=st.binary(min_size=1, max_size=5))
def test_towers_that_lie(vision: tuple[Path, Path], place: int, value: int, other: bytes) -> None:
    model, mmproj = vision
    content = bytearray(mmproj.read_bytes())
    struct.pack_into("<Q", content, place, value)
    content[place + 8 : place + 8 + len(other)] = other
    read_or_refused(model, changed(mmproj, bytes(content)))


@CHANGES
@given(size=st.floats(0, 1))
def test_files_that_are_cut_off_are_refused(text: Path, size: float) -> None:
    content = text.read_bytes()
    assert not read_or_refused(changed(text, content[: int(size * (len(content) - 1))]))


@pytest.mark.parametrize("alignment", [0, 3, 2**31])
def test_an_alignment_that_cannot_be_is_refused(text: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(path := text.with_name("aligned.gguf"), "llama")
    writer.add_uint32("general.alignment", alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"alignment is|architecture|no entry"):
        gguf_folder(path)


def test_an_array_longer_than_the_file_is_refused_at_once(text: Path) -> None:
    key = b"tokenizer.ggml.token_type"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, 2**62)  # of bytes
    path = changed(text, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    with pytest.raises(
        CheckpointError, match=r"changed.gguf is damaged or cut off \(it says that it has 4611686018427387904"
    ):
        GgufFile.read(path)


def test_contents_are_those_of_the_gguf_package(text: Path, vision: tuple[Path, Path]) -> None:
    for path in (text, *vision):
        ours, theirs = GgufFile.read(path), gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
        assert ours.entries.keys() == fields.keys()
        for name, value in fields.items():
            numbers = "image_" in name or isinstance(value, float)  # float32, of which ours are the shortest decimals
            assert ours.entries[name] == (pytest.approx(value, rel=1e-7) if numbers else value)
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            found = ours.tensors[tensor.name]
            assert (list(found.shape), found.kind) == (tensor.shape.tolist()[::-1], tensor.tensor_type.name)
            assert np.array_equal(found.rows.ravel(), tensor.data.ravel().view(np.uint8))
