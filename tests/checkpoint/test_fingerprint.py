"""A checkpoint's content is compared, and read only where size and modification time do not decide."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mdi.checkpoint import fingerprint
from mdi.checkpoint.fingerprint import Fingerprint
from mdi.checkpoint.safetensors import SINGLE
from mdi.checkpoint.source import Source, open_source


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was read."""
    names: list[str] = []
    hash_file = fingerprint.hash_file

    def noted(path: Path, count: Callable[[int], None]) -> str:
        names.append(path.name)
        return hash_file(path, count)

    monkeypatch.setattr(fingerprint, "hash_file", noted)
    return names


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, (1, 1))


def test_it_covers_all_files_that_decide_what_is_computed(source: Source, sharded: Path) -> None:
    assert [file.name for file in Fingerprint(source).record()] == ["config.json", SINGLE]
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    recorded = Fingerprint(open_source(sharded)).record()
    assert [file.name for file in recorded] == ["config.json", "model.safetensors.index.json", *shards]


def test_unchanged_files_are_not_read(source: Source, read: list[str]) -> None:
    recorded = Fingerprint(source).record()
    del read[:]
    again = Fingerprint(source)
    assert again.matches(recorded)
    assert again.record() == recorded
    assert not read


def test_a_file_with_a_new_time_is_read_and_its_content_decides(source: Source, read: list[str]) -> None:
    recorded = Fingerprint(source).record()
    del read[:]
    os.utime(source.path / SINGLE, (1, 1))
    touched = Fingerprint(source)
    assert touched.matches(recorded)
    assert touched.record() != recorded
    assert read == [SINGLE]
    flip_last_byte(source.path / SINGLE)
    assert not Fingerprint(source).matches(recorded)


def test_another_size_decides_without_reading(source: Source, read: list[str]) -> None:
    recorded = Fingerprint(source).record()
    del read[:]
    with (source.path / SINGLE).open("ab") as file:
        file.write(b"0")
    assert not Fingerprint(source).matches(recorded)
    assert not read


def test_a_file_more_or_less_is_another_checkpoint(source: Source) -> None:
    recorded = Fingerprint(source).record()
    assert not Fingerprint(source).matches(recorded[:1])
    assert not Fingerprint(source).matches((*recorded, recorded[0].model_copy(update={"name": "more"})))


def test_a_change_after_the_first_look_is_noticed(source: Source) -> None:
    before = Fingerprint(source)
    assert not before.changed()
    os.utime(source.path / "config.json", (1, 1))
    assert before.changed()


def test_progress_counts_the_bytes_that_are_read(source: Source) -> None:
    seen: list[tuple[str, int, int]] = []
    Fingerprint(source, lambda *report: seen.append(report)).record()
    size = (source.path / SINGLE).stat().st_size
    assert seen[-1] == (f"checking {SINGLE}", size, size)
