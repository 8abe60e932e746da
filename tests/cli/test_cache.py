"""`mdi cache` lists what is kept, and removes what is not in use."""

from __future__ import annotations

from pathlib import Path

import pytest
from testing.checkpoints import tiny_config
from typer.testing import CliRunner

from mdi.checkpoint.cache import Cache
from mdi.checkpoint.locks import Hold
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.cli.app import app
from mdi.core.errors import ConfigError
from mdi.node.store import ChunkStore


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["cache", *arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache with one received chunk, and one entry that was never finished."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    chunks = prepare(open_source(write_random_checkpoint(tmp_path / "pretty", tiny_config())), 2)
    cache = Cache.open()
    store = ChunkStore(cache)
    chunk = store.chunk(Manifest.read(chunks), "finisher")
    chunk.prepare()
    chunk.path.write_bytes((chunks / chunk.entry.file).read_bytes())
    store.close()
    (cache.folder / "0123").mkdir()
    return cache.folder


def test_the_list_says_what_every_entry_is_and_how_much_there_is(folder: Path) -> None:
    digest = next(path.name for path in folder.iterdir() if path.name != "0123")
    listed = run("ls")
    [row] = [line for line in listed.splitlines() if digest[:24] in line]
    assert "pretty, float32: finisher" in row
    assert "0.00 GB" in row
    assert "unfinished" in listed
    assert f"of at most 100.00 GB in {folder}" in listed
    hold = Hold(folder / "0123")
    assert "in use" in next(line for line in run("ls").splitlines() if "0123" in line)
    hold.close()
    assert "in use" not in run("ls")


def test_an_empty_cache_is_no_error(tmp_path: Path) -> None:
    assert "0.00 GB of at most" in run("ls", "--cache-folder", str(tmp_path / "nothing"))
    assert run("rm", "--all", "--cache-folder", str(tmp_path / "nothing")) == ""


def test_an_entry_is_removed_by_the_beginning_of_its_name(folder: Path) -> None:
    assert run("rm", "012").startswith("removed 0123")
    assert not (folder / "0123").exists()
    assert len(list(folder.iterdir())) == 1


def test_all_entries_are_removed_but_those_in_use(folder: Path) -> None:
    hold = Hold(folder / "0123")
    assert "0123 is in use and stays" in run("rm", "--all")
    assert [path.name for path in folder.iterdir()] == ["0123"]
    with pytest.raises(ConfigError, match="0123 is in use: stop the server or node"):
        run("rm", "0123")
    hold.close()
    run("rm", "--all")
    assert list(folder.iterdir()) == []


def test_what_is_not_meant_clearly_is_refused(folder: Path) -> None:
    for arguments in ((), ("0123", "--all")):
        with pytest.raises(ConfigError, match=r"name an entry.*or remove all of them with --all"):
            run("rm", *arguments)
    with pytest.raises(ConfigError, match="no entry of the cache begin"):
        run("rm", "xyz")
    (folder / "0124").mkdir()
    with pytest.raises(ConfigError, match="2 entries of the cache begin with '012'"):
        run("rm", "012")
    assert len(list(folder.iterdir())) == 3
