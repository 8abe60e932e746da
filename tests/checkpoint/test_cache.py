"""The cache folder: where it is, how large it may become, what is removed and what never is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from mdi.checkpoint.cache import Cache, default_cache_folder, limit_from_environment
from mdi.checkpoint.locks import Hold, exclusive
from mdi.core.errors import CheckpointError, ConfigError

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Three entries of 100 bytes, `a` the least recently used; 350 bytes are allowed."""
    for age_s, name in ((300, "a"), (200, "b"), (100, "c")):
        add(tmp_path, name, age_s)
    return Cache(tmp_path, 350)


def add(folder: Path, name: str, age_s: float) -> None:
    (folder / name / "inner").mkdir(parents=True)
    (folder / name / "inner" / "data").write_bytes(bytes(100))
    os.utime(folder / name, (1e9 - age_s, 1e9 - age_s))


def names(cache: Cache) -> list[str]:
    return [entry.name for entry in cache.entries()]


def test_entries_are_listed_the_least_recently_used_first(cache: Cache) -> None:
    (cache.folder / "speed.json").write_text("{}")
    assert [(entry.name, entry.size_bytes, entry.in_use) for entry in cache.entries()] == [
        ("a", 100, False),
        ("b", 100, False),
        ("c", 100, False),
    ]
    cache.hold("a").close()
    assert names(cache) == ["b", "c", "a"]


def test_a_folder_that_is_not_there_has_no_entries(tmp_path: Path) -> None:
    assert Cache(tmp_path / "nothing", 1).entries() == []


def test_no_more_is_removed_than_is_needed(cache: Cache) -> None:
    cache.make_room(50)
    assert names(cache) == ["a", "b", "c"]
    cache.make_room(51)
    assert names(cache) == ["b", "c"]


def test_what_is_in_use_is_never_removed(cache: Cache) -> None:
    with exclusive(cache.folder / "b"):
        hold = cache.hold("a")
        cache.make_room(100)
        assert names(cache) == ["b", "a"]
        with pytest.raises(CheckpointError, match=r"limited to .* in use.*MDI_CACHE_GB.*--cache-folder"):
            cache.make_room(151)
        assert names(cache) == ["b", "a"]
    hold.close()
    cache.make_room(350)
    assert names(cache) == []


def test_what_another_process_uses_is_never_removed(cache: Cache) -> None:
    script = "import sys; from pathlib import Path; from mdi.checkpoint.locks import Hold; "
    script += "hold = Hold(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(cache.folder / "a")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        cache.make_room(250)
        assert names(cache) == ["a"]
        process.kill()
    cache.make_room(350)
    assert names(cache) == []


def test_nothing_is_removed_in_vain(cache: Cache) -> None:
    with pytest.raises(CheckpointError, match="do not fit into the cache folder"):
        cache.make_room(351)
    assert names(cache) == ["a", "b", "c"]


def test_room_is_made_on_a_disk_that_is_full(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes = 2**26 + 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free_bytes))
    cache.make_room(20)
    assert names(cache) == ["a", "b", "c"]
    cache.make_room(30)
    assert names(cache) == ["b", "c"]
    with pytest.raises(CheckpointError, match=r"the disk of the cache folder .* is full .*make room.*--cache-folder"):
        cache.make_room(330)
    assert names(cache) == ["b", "c"]


def test_an_entry_in_use_is_not_removed_by_name_either(cache: Cache) -> None:
    entry = cache.entries()[0]
    hold = Hold(entry.folder)
    assert entry.in_use
    assert not entry.remove()
    hold.close()
    assert entry.remove()
    assert entry.remove()
    assert names(cache) == ["b", "c"]


@pytest.mark.parametrize(("text", "limit_bytes"), [("", 100 * 10**9), ("0.5", 5 * 10**8), ("2000", 2 * 10**12)])
def test_the_limit_comes_from_the_environment(text: str, limit_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDI_CACHE_GB", text)
    assert limit_from_environment() == limit_bytes


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDI_CACHE_GB", text)
    with pytest.raises(ConfigError, match=f"MDI_CACHE_GB is .* not '{text}'"):
        limit_from_environment()


def test_a_folder_that_cannot_be_used_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made.*--cache-folder"):
        Cache(tmp_path / "file" / "chunks", 1).check()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"nothing can be written into .*--cache-folder"):
        Cache(tmp_path, 1).check()


def test_chunks_are_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "mdi" / "chunks"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "mdi" / "chunks"
